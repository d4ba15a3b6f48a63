"""What a parallel plan does to the model: DDP, or FSDP2's fully_shard per block, over the mesh of parallel.py.

torch's own DistributedDataParallel and fully_shard do the work; this file decides what is wrapped, in which precision,
and when ranks talk to each other.
"""

import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from maskalign.training.compiling import compile_units
from maskalign.training.graphs import capture_stream


class Replicated(DistributedDataParallel):
    """DDP that shows the attributes of the model inside, so that the objective can ask it for its sizes."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


# Of DDP's synchronized iterations, the first ten read timers back from the device.
DDP_TIMED_ITERATIONS = 10


class Plan:
    """A model spread over the ranks of a placement.

    Args:
        model: the `SiT`, on the placement's device.
        config: `Config`.
        placement: `parallel.Placement`.

    Attributes:
        stream: on which steps run where they are captured as CUDA graphs, see graphs.py; else None.
    """

    def __init__(self, model, config, placement):
        self.model = model
        self.mesh, self.device = placement.mesh, placement.device
        self.several = placement.world_size > 1
        self.kind = config.parallel.plan if placement.mesh is not None else "none"
        self.keep_gathered = not config.parallel.reshard_after_forward
        self.sharded = self.kind in ("fsdp", "hsdp")
        self.stream = capture_stream(config, placement)
        self._replicas, self._idle, self._synchronized = None, [], 0
        if self.sharded:
            mesh = self.mesh if self.kind == "hsdp" else self.mesh["shard"]
            with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
                shard_model(model, mesh, placement.dtype, config.parallel)

    def forward(self, align, dropping):
        """What to call in training, with the model's signature; first used when parameters have their final dtype.

        Args:
            align: True where the step has an alignment loss. dropping: True where it keeps a subset of the tokens.
        """
        if self.kind != "ddp":
            return self.model
        idle = idle_parameters(self.model, align, dropping)
        if self._replicas is None or [id(p) for p in idle] != [id(p) for p in self._idle]:
            self._leave_replicas()
            self._replicas, self._idle = self._replicate(idle), idle
        return self._replicas

    def _replicate(self, idle):
        """DDP over the parameters that take part in a step.

        DDP would find the others by itself, but it reads their number back from the device in every step.
        """
        for p in idle:
            p.requires_grad_(False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch has two names for broadcast_buffers
            replicas = Replicated(
                self.model,
                device_mesh=self.mesh["replicate"],
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
                init_sync=False,  # every rank makes or loads the same weights
            )
        replicas._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # the timers of later iterations stay unread
        if next(self.model.parameters()).dtype == torch.bfloat16:
            replicas.register_comm_hook(None, reduce_in_float32)
        return replicas

    def _leave_replicas(self):
        if self._replicas is None:
            return
        self._replicas._remove_autograd_hooks()
        for p in self._idle:
            p.requires_grad_(True)
        self._replicas, self._idle, self._synchronized = None, [], 0

    def micro_batch(self, last):
        """Context of one forward and backward; gradients are averaged over the ranks in the last one of a step."""
        if self.kind == "ddp":
            self._synchronized += last
            return nullcontext() if last else self._replicas.no_sync()
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            # What is kept between forward and backward may as well stay for the next micro-batch.
            self.model.set_reshard_after_backward(last or not self.keep_gathered)
        return nullcontext()

    @property
    def can_capture(self):
        """True where the next step asks the device for nothing."""
        return self.kind != "ddp" or self._synchronized > DDP_TIMED_ITERATIONS

    def settle(self):
        """Bring a sharded model to where a step begins, for a capture: nothing may depend on work outside of it."""
        for module in self._sharded_modules():
            module.reshard()

    def abandon_step(self):
        """Forget a step that ended in the middle. Nothing of it may be under way any more."""
        self.model.zero_grad(set_to_none=True)
        self._leave_replicas()
        for module in self._sharded_modules():
            abandon_shards(module._get_fsdp_state())
        self.settle()

    def _sharded_modules(self):
        return [module for module in self.model.modules() if isinstance(module, FSDPModule)]

    def mean(self, values):
        """Mean of a small tensor over all ranks, in place."""
        if self.several:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values

    def sum_over_ranks(self, number):
        """Sum of an integer over all ranks."""
        if not self.several:
            return number
        value = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(value)
        return int(value)

    def max_over_ranks(self, *numbers):
        """The largest of all ranks, of each of some numbers, as floats."""
        if not self.several:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def from_rank_0(self, number):
        """Rank 0's float on all ranks."""
        if not self.several:
            return number
        value = torch.tensor(number, dtype=torch.float64, device=self.device)
        dist.broadcast(value, 0)
        return float(value)

    def wait(self):
        """Wait for all ranks."""
        if self.several:
            dist.barrier()


def shard_model(model, mesh, dtype, parallel):
    """FSDP2 on every block, and on the rest as the root; parameters become float32 DTensors, gathered in `dtype`.

    The last block and the root are needed again at once when the backward begins, so they stay gathered until then.

    Args:
        model: a `SiT`.
        mesh: DeviceMesh (shard,) or (replicate, shard).
        dtype: float32 or bfloat16, of gathered weights; gradients are reduced in float32.
        parallel: `ParallelConfig`.
    """
    # The objective computes out of place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    low = dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,  # time stays in float32, see flow_matching.training_loss
    )
    blocks = model.all_blocks
    for block in blocks:
        reshard = parallel.reshard_after_forward and block is not blocks[-1]
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for number, block in enumerate(blocks):
        ahead, behind = blocks[number + 1 :], blocks[:number][::-1]
        block.set_modules_to_forward_prefetch(ahead[: parallel.prefetch])
        block.set_modules_to_backward_prefetch(behind[: parallel.prefetch])


def idle_parameters(model, align, dropping):
    """The parameters of a `SiT` that a step leaves without a gradient: the projectors without an alignment loss, and
    SPRINT's mask token where all tokens are kept.

    Args: as of `Plan.forward`.
    """
    idle = [] if align else list(model.projectors.parameters())
    if model.fuse is not None and not dropping:
        idle.append(model.fuse.mask_token)
    return idle


def abandon_shards(state):
    """Forget what FSDP keeps of a step that ended in the middle: its events belong to a capture that is no more.

    Newer versions of torch have `reset_iter_state` for this, but it waits for the events.

    Args:
        state: of one FSDP module.
    """
    # Private to torch, and needed here alone: a version without it must still train.
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    context, step = state._comm_ctx, state._state_ctx
    context.all_gather_state = None
    context.post_forward_order.clear()
    for name in ("reduce_scatter_states", "_last_post_reduce_events"):
        getattr(context, name, {}).clear()
    context.reduce_scatter_state = None
    step.iter_forward_root, step.post_backward_final_callback_queued = None, False
    state._training_state = TrainingState.IDLE
    getattr(state, "_modules_to_run_forward", set()).clear()
    groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    for group in filter(None, groups):
        group._training_state = TrainingState.IDLE
        group._post_forward_indices.clear()
        for name in ("_all_gather_result", "_post_reduce_event", "_all_reduce_state", "_partial_reduce_output"):
            setattr(group, name, None)
        group._reshard_after_forward_event = None
        for param in group.fsdp_params:
            param.unsharded_accumulated_grad = None
            if hasattr(param, "_unsharded_param"):
                param._unsharded_param.grad = None


def reduce_in_float32(_, bucket):
    """DDP communication hook: the mean of bfloat16 gradients, summed in float32."""
    total = bucket.buffer().float().div_(dist.get_world_size())
    work = dist.all_reduce(total, async_op=True).get_future()
    return work.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def prepare_teacher(network, config, placement):
    """Compile a frozen network's blocks, and shard it where the plan shards and it is large.

    Args:
        network: nn.Module; what it calls `blocks` (a ViT's) are the units, else it is one unit itself.
        config: `Config`; training.compile and parallel.shard_teacher_above.
        placement: `ranks.Placement`.
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
