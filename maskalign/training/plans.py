"""Apply a parallel plan to the model: DDP, or FSDP2's fully_shard per block, over the mesh of parallel.py.

The work is done by torch's DistributedDataParallel and fully_shard. This file decides which modules are wrapped, in
which precision, and when the ranks communicate.
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
    """DDP that gives access to the attributes of the wrapped model, because the objective reads its sizes."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


# DDP reads timers back from the device in its first ten synchronized iterations.
DDP_TIMED_ITERATIONS = 10


class Plan:
    """A model spread over the ranks of a placement.

    Args:
        model: the `SiT`, on the placement's device.
        config: `Config`.
        placement: `parallel.Placement`.

    Attributes:
        stream: the CUDA stream of steps that are captured as CUDA graphs, see graphs.py; None without capture.
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
        """The module to call in training, with the model's signature.

        The parameters must have their final dtype at the first call.

        Args:
            align: True if the step has an alignment loss.
            dropping: True if the step keeps only a subset of the tokens.
        """
        if self.kind != "ddp":
            return self.model
        idle = idle_parameters(self.model, align, dropping)
        if self._replicas is None or [id(p) for p in idle] != [id(p) for p in self._idle]:
            self._leave_replicas()
            self._replicas, self._idle = self._replicate(idle), idle
        return self._replicas

    def _replicate(self, idle):
        """DDP over the parameters that get a gradient in a step; `idle` are the other ones.

        DDP could find the idle parameters by itself, but it would read back from the device in every step for this.
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
        replicas._set_ddp_runtime_logging_sample_rate(2**31 - 1)  # do not read the timers of later iterations
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
            # If weights stay gathered between forward and backward, they also stay gathered for the next micro-batch.
            self.model.set_reshard_after_backward(last or not self.keep_gathered)
        return nullcontext()

    @property
    def can_capture(self):
        """True if the next step reads nothing back from the device."""
        return self.kind != "ddp" or self._synchronized > DDP_TIMED_ITERATIONS

    def settle(self):
        """Reshard the model, as at the start of a step, because a captured step must not depend on earlier work."""
        for module in self._sharded_modules():
            module.reshard()

    def abandon_step(self):
        """Discard the state of a step that failed. No work of it may be running on the device any more."""
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
        """The maximum over all ranks of each of the numbers, as floats."""
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
    """Apply FSDP2 to every block, and to the rest as the root; parameters become float32 DTensors, gathered in `dtype`.

    The backward begins with the root and the last block, so these stay gathered after the forward.

    Args:
        model: a `SiT`.
        mesh: DeviceMesh (shard,) or (replicate, shard).
        dtype: dtype of the gathered weights, float32 or bfloat16; gradients are reduced in float32.
        parallel: `ParallelConfig`.
    """
    # The warning concerns operations in place; the objective computes out of place.
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
    """The parameters of a `SiT` that get no gradient in a step.

    These are the projectors if there is no alignment loss, and SPRINT's mask token if all tokens are kept. For the
    arguments see `Plan.forward`.
    """
    idle = [] if align else list(model.projectors.parameters())
    if model.fuse is not None and not dropping:
        idle.append(model.fuse.mask_token)
    return idle


def abandon_shards(state):
    """Discard FSDP's state of a step that failed, because its events belong to a capture that was discarded.

    Newer versions of torch have `reset_iter_state` for this, but it waits for the events.

    Args:
        state: FSDP's state of one module.
    """
    # This is private to torch. It is imported here because a version of torch without it must still train.
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
    """DDP communication hook that averages bfloat16 gradients and sums them in float32."""
    total = bucket.buffer().float().div_(dist.get_world_size())
    work = dist.all_reduce(total, async_op=True).get_future()
    return work.then(lambda done: bucket.buffer().copy_(done.value()[0]))


def prepare_teacher(network, config, placement):
    """Compile the blocks of a frozen network, and shard it if the plan shards models and the network is large.

    Args:
        network: nn.Module. The units are its `blocks` (as in a ViT) if it has this attribute, else the whole network.
        config: `Config`; training.compile, parallel.plan and parallel.shard_teacher_above are used.
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
    register_fsdp_forward_method(network, "forward_features")  # the method of a ViT that encoders.py calls
