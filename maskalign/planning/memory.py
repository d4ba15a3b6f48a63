"""Peak memory of a rank from two traced steps, for any number of images and ranks.

Every operation allocates a + b * images bytes, so two traces of the same operations give the memory after each
operation for any batch size, and its peak. Memory that FSDP shards is scaled by the bytes of a shard.
"""

from dataclasses import dataclass

import numpy as np
import torch

from maskalign.planning.trace import COLUMNS, FORWARD, UPDATE, trace_step

TRACED = (2, 3)  # numbers of images; a single image has different memory layouts
DDP_BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default
BUCKETS_AT_ONCE = 2  # buckets that are being reduced at the same time


@dataclass(frozen=True)
class Peak:
    """Bytes on a rank at the peak of a step, by kind; `kept` are activations saved for the backward."""

    parameters: float
    gradients: float
    optimizer: float
    ema: float
    activations: float
    buffers: float
    kept: float

    @property
    def total(self):
        return self.parameters + self.gradients + self.optimizer + self.ema + self.activations + self.buffers


class Memory:
    """The memory of one phase of a run on one rank.

    Args:
        config, spec, phase, teacher_bytes, dtype, shards, plain_attention: see `trace.trace_step`.
        frozen: bytes of the frozen networks on a rank (teachers in the loop).
    """

    def __init__(
        self, config, spec, phase, *, teacher_bytes=None, dtype=torch.bfloat16, shards=1, plain_attention=False,
        frozen=0,
    ):  # fmt: skip
        self.parallel = config.parallel
        own = dict(teacher_bytes=teacher_bytes, dtype=dtype, shards=shards, plain_attention=plain_attention)
        self.low, self.high = (trace_step(config, spec, phase, images, **own) for images in TRACED)
        if self.low.bytes.shape != self.high.bytes.shape:
            raise RuntimeError("the operations of a step depend on its batch: memory cannot be extrapolated")
        self.slope = (self.high.bytes - self.low.bytes) / (TRACED[1] - TRACED[0])
        self.stage, self.held = self.low.stage, self.low.held
        self.frozen = frozen
        self.half = dtype == torch.bfloat16

    def peak(self, images, sharded=1.0):
        """The `Peak` for a number of images per micro-batch.

        Args:
            images: images per micro-batch.
            sharded: bytes of a shard divided by those of the traced one.
        """
        course = self.low.bytes + self.slope * (images - self.low.images)
        columns = {name: course[:, k].copy() for k, name in enumerate(COLUMNS)}
        update = self.stage == UPDATE
        kept = self._kept(columns)
        # Memory allocated by the update besides the moments counts as gradients: float32 copies of them, temporaries.
        start = int(np.argmax(update)) if update.any() else len(update)
        before = columns["activations"][max(start - 1, 0)]
        columns["gradients"][update] += columns["activations"][update] - before
        columns["activations"][update] = before
        held = {name: count * sharded for name, count in self.held.items()}
        state = self.held["moments"] + self.held["ema"] + (self.held["masters"] if self.held["copies"] else 0)
        extra = columns["state"] - state
        columns["gradients"] += extra * sharded
        parameters = columns["parameters"] + columns["sharded parameters"] * sharded
        parameters = parameters + (held["masters"] if self.held["copies"] else 0)
        gradients = columns["gradients"] + columns["sharded gradients"] * sharded
        buffers = columns["buffers"] + columns["temporaries"] + self.frozen
        if self.parallel.plan == "ddp":
            # Gradients are views of DDP's buckets, which are never freed. The communication hook for bfloat16 gradients
            # copies some buckets to float32.
            full = self.held["copies"] or self.held["masters"]
            standing = np.where(update, np.maximum(gradients, full), full)
            gradients = standing
            buffers = buffers + (~update & (self.stage != FORWARD)) * self.half * BUCKETS_AT_ONCE * 2 * DDP_BUCKET
        ema = 0.0 if self.parallel.ema_on_cpu else held["ema"]
        total = parameters + gradients + held["moments"] + ema + columns["activations"] + buffers
        top = int(np.argmax(total))
        return Peak(
            parameters=float(parameters[top]),
            gradients=float(gradients[top]),
            optimizer=float(held["moments"]),
            ema=float(ema),
            activations=float(columns["activations"][top]),
            buffers=float(buffers[top]),
            kept=float(kept),
        )

    def _kept(self, columns):
        """Bytes of activations at the end of the first forward."""
        backward = np.nonzero(self.stage != FORWARD)[0]
        last = (backward[0] if len(backward) else len(self.stage)) - 1
        return columns["activations"][last]

    def largest(self, limit, sharded=1.0):
        """The largest number of images per micro-batch whose peak is at most `limit` bytes; 0 if not even one fits."""
        if self.peak(1, sharded).total > limit:
            return 0
        low, high = 1, 2
        while self.peak(high, sharded).total <= limit:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.peak(middle, sharded).total <= limit else (low, middle)
        return low


def shard_bytes(model, ranks):
    """Bytes of float32 parameters on the rank with the largest shard: FSDP2 shards the first dimension, rounded up.

    Args:
        model: a `SiT`, which may be on the meta device.
        ranks: number of ranks that share one copy.
    """
    return sum(4 * -(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in model.parameters())
