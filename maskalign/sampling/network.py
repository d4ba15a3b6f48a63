"""A model as the samplers run it: without its projectors, its weights rounded to bf16 once and not at every use."""

import copy
from contextlib import nullcontext

import torch
from torch import nn

from maskalign.training.parallel import compute_dtype


class Network:
    """Gives the velocity of a model at (x, t, labels) in the precision that sampling asks for.

    With `bf16` it runs a copy of the model whose weights are bf16: autocast would round each of them at every use, or
    keep a second set beside the first. The time enters in float32, since 8 bits do not tell 0.996 from 1; the velocity
    leaves in float32. A model that is compiled or sharded cannot be copied and runs under autocast instead.

    Args:
        model: a `SiT`, or anything with its `in_channels`, `input_size` and `num_classes` that is called like one.
        precision: `fp32` (the dtype of the model's own weights), `bf16`, or `auto`: bf16 where the processor has it.

    Attributes:
        in_channels, input_size, num_classes: those of the model.
        device: torch.device; dtype: torch.dtype that states are given in, float32 (float64 for a float64 model).
        precision: `fp32` or `bf16`.
    """

    def __init__(self, model, precision="auto"):
        parameter = next(model.parameters())
        self.model, self.device = model, parameter.device
        self.in_channels, self.input_size, self.num_classes = model.in_channels, model.input_size, model.num_classes
        self.precision = resolve_precision(precision, self.device)
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        # The projectors serve training alone: a quarter of the work of a small model that is not needed here.
        self.extra = {"align": False} if hasattr(model, "projectors") else {}
        self.low = self.precision == "bf16" and can_copy(model)
        self.autocast = self.precision == "bf16" and not self.low
        if self.low:
            self.model = bf16_copy(model)

    def __call__(self, x, t, labels):
        """Velocity (B, C, H, W) in `dtype`, of x (B, C, H, W) and t (B,) in `dtype`.

        labels: (B,) int64, or (B, D) class embeddings.
        """
        if self.low:
            x = x.to(torch.bfloat16)
            labels = labels.to(torch.bfloat16) if labels.is_floating_point() else labels
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            out = self.model(x, t, labels, **self.extra)
        return getattr(out, "velocity", out).to(self.dtype)

    def class_embeddings(self):
        """(num_classes + 1, D) the rows of the model's label table in its own precision, "no class" last."""
        return self.model.y_embedder.embedding_table.weight


def resolve_precision(precision, device):
    """`fp32` or `bf16`: `auto` is bf16 where the processor multiplies it natively."""
    return "bf16" if compute_dtype(precision, device) == torch.bfloat16 else "fp32"


def can_copy(model):
    """False for a model whose forward is compiled or whose weights are sharded: both are bound to the original."""
    from torch.distributed.tensor import DTensor

    plain = not any("forward" in vars(module) for module in model.modules())
    return plain and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


def bf16_copy(model):
    """The model in bf16, in eval mode and without projectors; the original is left as it is."""
    skipped = {id(model.projectors): nn.ModuleList()} if hasattr(model, "projectors") else {}
    return copy.deepcopy(model, skipped).requires_grad_(False).to(torch.bfloat16).eval()
