"""Peak memory of a rank from two traced steps: at any number of images, and on any number of ranks.

Every operation allocates a + b * images bytes, so two traces of the same operations give the course at any batch, and
its highest point. What FSDP shards is scaled by the bytes of a shard.
"""

from dataclasses import dataclass

import numpy as np
import torch

from maskalign.planning.trace import COLUMNS, FORWARD, UPDATE, trace_step

TRACED = (2, 3)  # images; a single one has layouts of its own
DDP_BUCKET = 25 * 2**20  # bytes, DistributedDataParallel's default
BUCKETS_AT_ONCE = 2  # that are being reduced


@dataclass(frozen=True)
class Peak:
    """Bytes on a rank at the moment when it holds most, by kind; `kept`: activations kept for the backward."""

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
        frozen: bytes of the networks that are not trained on a rank (teachers in the loop).
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
        """`Peak` at a number of images per micro-batch.

        Args:
            sharded: bytes of a shard over those of the traced one.
        """
        course = self.low.bytes + self.slope * (images - self.low.images)
        columns = {name: course[:, k].copy() for k, name in enumerate(COLUMNS)}
        update = self.stage == UPDATE
        kept = self._kept(columns)
        # What the update makes beside the moments is made of gradients: float32 ones for masters, temporaries.
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
            # Gradients lie in DDP's buckets, which stay; the hook that sums bfloat16 in float32 copies some of them.
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
        """Activations at the end of the first forward, less what was there before it."""
        backward = np.nonzero(self.stage != FORWARD)[0]
        last = (backward[0] if len(backward) else len(self.stage)) - 1
        return columns["activations"][last]

    def largest(self, limit, sharded=1.0):
        """The most images per micro-batch whose peak stays within `limit` bytes; 0 where not even one does."""
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
    """Bytes of float32 parameters on the rank that has most, as FSDP2 shards: rows of the first dimension, rounded up.

    Args:
        model: a `SiT`, which may be on the meta device. ranks: that share one copy.
    """
    return sum(4 * -(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) for p in model.parameters())
