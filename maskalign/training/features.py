"""The teachers' features of a batch: read from the shards, or computed by frozen encoders, compiled and sharded."""

import torch
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from maskalign.teachers import load_teacher, load_teacher_like, resample_tokens
from maskalign.training.compiling import compile_units


class Features:
    """Teacher features of a batch on the student's grid: from the shards, or computed from the images.

    Args:
        config, manifest: of the run.
        teachers: list of (name, cached).
        grid: (rows, columns) of the student's tokens.
        placement: `parallel.Placement`.
    """

    def __init__(self, config, manifest, teachers, grid, placement):
        self.grid = grid
        self.device = device = placement.device
        self.sources = []
        weights = config.teacher.weights
        for name, cached in teachers:
            if cached:
                self.sources.append(
                    (name, None, tuple(manifest.teachers[name]["grid"]), manifest.teachers[name]["dim"])
                )
                continue
            own = dict(weights=weights, image_size=manifest.resolution, device=device)
            if name in manifest.teachers:
                teacher = load_teacher_like(name, manifest.teachers[name], **own)
            else:
                teacher = load_teacher(name, normalize=config.teacher.normalize, **own)
            prepare_teacher(teacher.encoder.network, config, placement)
            self.sources.append((name, teacher, teacher.grid, teacher.dim))

    @property
    def dims(self):
        return [dim for _, _, _, dim in self.sources]

    @property
    def class_dim(self):
        return None

    @torch.no_grad()
    def __call__(self, batch):
        """(teachers, class token): one (b, N, Dz) per teacher, floating or int8; and None."""
        out = []
        for name, teacher, grid, _ in self.sources:
            if teacher is None:
                z = batch[name].to(self.device, non_blocking=True)
            else:
                z = teacher(batch["image"].to(self.device, non_blocking=True))
            # int8 rows have no common length, which a weighted mean of neighbours needs: resample before storing.
            out.append(z if grid == self.grid else resample_tokens(z.float(), grid, self.grid))
        return out, None


def prepare_teacher(network, config, placement):
    """Compile a frozen network's blocks, and shard it where the plan shards and it is large.

    Args:
        network: nn.Module; what it calls `blocks` (a ViT's) are the units, else it is one unit itself.
        config: `Config`; training.compile and parallel.shard_teacher_above.
        placement: `parallel.Placement`.
    """
    blocks = list(getattr(network, "blocks", ()))
    if config.training.compile:
        compile_units(blocks or [network])
    size = sum(p.numel() * p.element_size() for p in network.parameters()) / 2**20
    if config.parallel.plan not in ("fsdp", "hsdp") or size <= config.parallel.shard_teacher_above:
        return
    mesh = placement.mesh if config.parallel.plan == "hsdp" else placement.mesh["shard"]
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(network, mesh=mesh)
    register_fsdp_forward_method(network, "forward_features")  # what encoders.py calls of a ViT
