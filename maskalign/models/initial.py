"""Initial weights. They do not depend on the order of parameters, the device or sharding.

The rules are those of REPA (arXiv 2410.06940): Xavier-uniform linears with zero bias, the same for the patch
convolution with its flattened kernel, N(0, 0.02) for the label embedding and the two linears of the time embedding, and
zeros for every adaLN linear and the final linear. Other convolutions have torch's initialization.
"""

import hashlib
import math

import torch
from torch import nn
from torch.distributed.tensor import distribute_tensor

from maskalign.models.layers import AdaLN, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder
from maskalign.models.routing import Fuse


@torch.no_grad()
def initialize(model, seed=None):
    """Fill every parameter of a model.

    Args:
        model: the model. Its parameters may be DTensors; each rank then draws the full parameter and keeps its shard.
        seed: each parameter is drawn on the CPU from a generator keyed by the seed and the parameter's name. With None,
            torch's global generator is used.
    """
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        generator = None
        if seed is not None:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        full = torch.empty(parameter.shape, dtype=parameter.dtype)
        _draw(full, modules, name, generator)
        assign(parameter, full)


@torch.no_grad()
def assign(parameter, full):
    """Copy a full tensor, which is equal on all ranks, into a parameter or into this rank's shard of it."""
    if hasattr(parameter, "placements"):
        full = full.to(device=parameter.device, dtype=parameter.dtype)
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.detach().copy_(full)


def _draw(full, modules, name, generator):
    owner, _, leaf = name.rpartition(".")
    module, chain = modules[owner], [modules[part] for part in _prefixes(owner)]
    if leaf == "mask_token" and isinstance(module, Fuse):
        full.normal_(std=0.02, generator=generator)
    elif isinstance(module, nn.LayerNorm):
        full.fill_(1.0 if leaf == "weight" else 0.0)
    elif any(isinstance(outer, AdaLN) for outer in chain) or isinstance(chain[-2], FinalLayer):
        full.zero_()
    elif isinstance(module, nn.Embedding) or any(
        isinstance(outer, (TimestepEmbedder, LabelEmbedder)) for outer in chain
    ):
        full.normal_(std=0.02, generator=generator) if leaf == "weight" else full.zero_()
    elif isinstance(module, nn.Linear) or isinstance(chain[-2], PatchEmbed):
        if leaf == "weight":
            rows, columns = full.shape[0], full[0].numel()
            full.uniform_(-1, 1, generator=generator).mul_(math.sqrt(6 / (rows + columns)))
        else:
            full.zero_()
    elif isinstance(module, nn.Conv2d):
        full.uniform_(-1, 1, generator=generator).mul_(1 / math.sqrt(module.weight[0].numel()))
    else:
        raise TypeError(f"no rule for the initial value of {name}")


def _prefixes(path):
    """The names of a module and of all modules that contain it, starting with the outermost ("")."""
    parts = path.split(".")
    return ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
