"""Trace the memory of one training step on fake tensors with torch's memory trackers, by kind and in order.

The step is that of the trainer (training/step.py, plans.py, optimizer.py) in a fake process group, so the plan is for
the code that runs: FSDP2 gathers and frees weights, and AdamW allocates its temporaries. Fake tensors have shapes but
no data, so a trace of XL takes a few hundred MB. They are on the CPU, because autograd cannot run on a GPU that does
not exist. Their sizes are the same as on a GPU, with torch's fused attention instead of the plain one of CPUs.
"""

import logging
import re
import warnings
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import List

import numpy as np
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh

from maskalign.checkpoints.build import build_model
from maskalign.objective.draws import Draws
from maskalign.runtime.ranks import Placement
from maskalign.training.compiling import prepare_blocks
from maskalign.training.optimizer import Optimizer
from maskalign.training.plans import Plan
from maskalign.training.step import TrainStep

# Torch's names of kinds of memory, and ours. Sharded memory depends on the number of ranks, the rest does not.
KINDS = {
    "Parameter": "parameters",
    "Sharded Param": "sharded parameters",
    "Unsharded Param": "parameters",
    "Gradient": "gradients",
    "Sharded Grad": "sharded gradients",
    "Unsharded Grad": "gradients",
    "Reduce Scatter": "gradients",
    "Optstate": "state",
    "OptState": "state",
    "Activation": "activations",
    "Temp": "temporaries",
    "All Gather": "temporaries",
    "Buffer": "buffers",
    "Other": "buffers",
    "Inputs": "buffers",
}
COLUMNS = list(dict.fromkeys(KINDS.values()))
FORWARD, BACKWARD, UPDATE = range(3)

# Operations that launch nothing, in addition to views.
NO_LAUNCH = {"detach", "alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
NO_LAUNCH |= {
    "_unsafe_view",
    "_reshape_alias",
    "is_same_size",
    "resize_",
    "set_",
    "record_stream",
    "_local_scalar_dense",
}
# Parts of the names of operations that torch.compile does not fuse with others.
PRODUCTS = ("mm", "convolution", "attention", "mix_and_drop", "adaln")
BLOCK = re.compile(r"\.(blocks|layers)\.\d+(\.|$)|\.mixer(\.|$)")
# Kernels that torch.compile generates for the operations between the products of a block, per product. They were
# counted for a SiT block on a GPU: 5 for 6 products in the forward, and about 14 for 11 in the backward.
FUSED_PER_PRODUCT = 1.0


@dataclass
class Trace:
    """The memory of one step on one rank, for one number of images.

    Attributes:
        images: images per micro-batch.
        bytes: (events, len(COLUMNS)) int64: bytes allocated after each operation.
        stage: (events,) FORWARD, BACKWARD or UPDATE.
        held: {name: bytes} that are allocated during the whole step: masters, copies, moments, ema.
        launches: `Launches` of the step.
        collectives: (operation, ranks, bytes) of every collective, in order.
    """

    images: int
    bytes: np.ndarray
    stage: np.ndarray
    held: dict
    collectives: List[tuple]
    launches: "Launches"


@dataclass
class Launches:
    """The numbers of operations of a step that are launched on a device.

    Attributes:
        products: in blocks, per micro-batch: matrix products and attention, which are separate launches also when the
            block is compiled.
        others: in blocks, per micro-batch: elementwise operations and reductions.
        outside: outside of blocks, per micro-batch.
        update: in clipping, optimizer and EMA.
    """

    products: float = 0
    others: float = 0
    outside: float = 0
    update: float = 0

    def total(self, micro_batches, compiled):
        """The number of launches of a step."""
        blocks = self.products * (1 + FUSED_PER_PRODUCT) if compiled else self.products + self.others
        return micro_batches * (blocks + self.outside) + self.update


class _Watch:
    """Mixin for torch's trackers that records memory after each operation, stages, collectives and launches."""

    def begin(self):
        self.events, self.stages, self.collectives = [], [], []
        self.updating = False
        self.launches = Launches()

    def _count(self, func):
        """Count an operation, unless it only makes views or allocates memory."""
        name = func._schema.name.split("::")[1]
        if func.is_view or func.namespace == "prim" or name in NO_LAUNCH:
            return
        where = "update"
        if not self.updating:
            inside = any(BLOCK.search(module) for module in self._mod_tracker.parents)
            product = any(part in name for part in PRODUCTS)
            where = ("products" if product else "others") if inside else "outside"
        setattr(self.launches, where, getattr(self.launches, where) + 1)

    def hold(self, *tensors, kind):
        """Count tensors that were allocated before the step."""
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, next(k for k in self._ref_class if k.value == kind))

    def _update_peak_stats(self, peak_state):
        # Torch would record the peak of every module. This records the memory after each operation, which is faster.
        row = dict.fromkeys(COLUMNS, 0)
        for kinds in self._curr_mem_snap.values():
            for kind, count in kinds.items():
                if kind != "Total":
                    row[KINDS[kind.value]] += count
        self.events.append(tuple(row.values()))
        self.stages.append(UPDATE if self.updating else BACKWARD if self._mod_tracker.is_bw else FORWARD)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a check of values, which fake tensors do not have, passes
        self._count(func)
        result = super().__torch_dispatch__(func, types, args, kwargs or {})
        if func in collective_ops and func not in sync_ops and result is not NotImplemented:
            size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
            ranks = CollectiveOp.get_process_group(func, args).size()
            self.collectives.append((func._schema.name.split("::")[1], ranks, size))
        return result


class _ShardedTracker(_Watch, FSDPMemTracker):
    """The tracker of a model with fully_shard."""


class _PlainTracker(_Watch, MemTracker):
    """The tracker of a model without sharding."""


class _Step(TrainStep):
    """The trainer's step, with empty tensors instead of random numbers, which are drawn in groups of eight images."""

    def draws(self, step, first_slot, count, kept, drawn, posterior):
        model, kept, aligned = self.model, self.phase.kept, self.phase.aligned
        shape = (count, model.in_channels, model.input_size, model.input_size)
        some = aligned and self.config.method.align_ratio is not None
        return Draws(
            torch.empty(count),
            torch.empty(shape),
            torch.empty(count, dtype=torch.bool),
            torch.empty(count, kept, dtype=torch.int64) if kept < model.num_tokens else None,
            torch.empty(count, aligned, dtype=torch.int64) if some else None,
            torch.empty(shape) if posterior else None,
            torch.empty(count, model.class_dim) if model.class_dim else None,
        )


def trace_step(
    config, spec, phase, images, *, teacher_bytes=None, dtype=torch.bfloat16, shards=1, plain_attention=False
):
    """Trace one step with `images` images per micro-batch.

    Args:
        config: `Config`; parallel.plan determines how the model is sharded.
        spec: `ModelSpec`; if it has a `latent`, the input is stored moments.
        phase: `work.Phase`.
        images: images per micro-batch.
        teacher_bytes: bytes per element of each teacher's tokens, 4 for those computed in the loop. The default is 1
            (int8).
            With a class token, each teacher has one more row.
        dtype: dtype of parameters and activations.
        shards: number of ranks that share one copy of the weights, for the plans fsdp and hsdp.
        plain_attention: whether attention uses plain operations, as on a CPU.

    Returns:
        Trace.

    Raises:
        RuntimeError: a process group is initialized.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without a process group")
    # All micro-batches but the last have the same memory; the last one also reduces gradients.
    parts = min(config.training.accumulation, 2)
    config = deepcopy(config)
    config.model.attention = "math" if plain_attention else "sdpa"
    config.training = replace(config.training, accumulation=parts, compile=False)
    config.parallel.ema_on_cpu = False  # handled in memory.py: all fake tensors are on one device
    with _ranks(config.parallel.plan, shards) as mesh, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        placement = Placement(torch.device("cpu"), dtype, 0, dist.get_world_size() if mesh else 1, 0, mesh)
        if mesh is None:
            config.parallel.plan = "none"
        with torch.device("meta"):
            model = build_model(config, spec)
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _traced(config, spec, teacher_bytes, phase, model, placement, images, parts)


def _traced(config, spec, teacher_bytes, phase, model, placement, images, parts):
    plan = Plan(model, config, placement)
    model.to_empty(device="cpu")
    optimizer = Optimizer(model, config.optimizer, placement.dtype)
    optimizer.tensors()  # allocates the moments, which the first step of a run would allocate
    prepare_blocks(model, config)
    step = _Step(model, optimizer, config, placement, plan, spec.latent)
    step.phase = phase
    count = images * parts
    labels = torch.zeros(count, dtype=torch.int64)
    channels = spec.in_channels * (2 if spec.latent else 1)
    inputs = torch.empty(count, channels, spec.input_size, spec.input_size)
    stored = {1: torch.int8, 2: torch.float16, 4: torch.float32}
    teachers = [
        torch.empty(count, model.num_tokens + (model.class_dim is not None), dim, dtype=stored[size])
        for dim, size in zip(spec.teacher_dims, teacher_bytes or [1] * len(spec.teacher_dims), strict=True)
    ]
    class_token = torch.empty(count, model.class_dim) if model.class_dim else None
    given = [inputs, labels, *teachers, *([] if class_token is None else [class_token])]
    if plan.sharded:
        tracker = _ShardedTracker(model, optimizer.adamw)
        tracker.track_inputs(tuple(given))
        tracker.hold(*optimizer.ema, kind="OptState")
    else:
        tracker = _PlainTracker()
        tracker.track_external(model, optimizer.adamw, *given)
        tracker.hold(*optimizer.ema, kind="Optstate")
        if optimizer.has_copies:
            tracker.hold(*optimizer.masters, kind="Optstate")
    tracker.begin()
    update, micro_batch = optimizer.step, plan.micro_batch

    def fresh(last):
        tracker.reset_mod_stats()  # torch's trackers support only one forward of a module
        return micro_batch(last)

    def watched(*args):
        tracker.updating = True
        try:
            return update(*args)
        finally:
            tracker.updating = False

    optimizer.step, plan.micro_batch = watched, fresh
    config.method.keep_ratio = phase.kept / model.num_tokens
    config.method.align_weight = 1.0 if phase.aligned else 0.0
    with tracker:
        step(0, 0.0, inputs, labels, teachers, class_token=class_token)
    state = optimizer.adamw.state.values()
    held = {
        "masters": _nbytes(optimizer.masters),
        "copies": _nbytes(optimizer.params) if optimizer.has_copies else 0,
        "moments": _nbytes([entry[key] for entry in state for key in ("exp_avg", "exp_avg_sq")]),
        "ema": _nbytes(optimizer.ema),
    }
    launches = tracker.launches
    for part in ("products", "others", "outside"):
        setattr(launches, part, getattr(launches, part) / parts)
    return Trace(images, np.array(tracker.events), np.array(tracker.stages), held, tracker.collectives, launches)


def _nbytes(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _ranks(plan, shards):
    """The device mesh of a plan in a fake process group, or None for plans without sharding.

    Two replicas have the same memory per rank as any larger number. DDP needs no mesh, because memory.py adds its
    allocations.
    """
    if plan not in ("fsdp", "hsdp"):
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    replicas = 2 if plan == "hsdp" else 1
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=replicas * shards)
    try:
        names, sizes = ("replicate", "shard"), (replicas, shards)
        if plan == "fsdp":  # one dimension, because a mesh with two would make a group for every rank
            names, sizes = names[1:], sizes[1:]
        yield init_device_mesh("cpu", sizes, mesh_dim_names=names)
    finally:
        dist.destroy_process_group()
        logging.disable(level)
