"""What a parallel plan does to the model: DDP, or FSDP2's fully_shard per block, over the mesh of parallel.py.

torch's own DistributedDataParallel and fully_shard do the work; this file decides what is wrapped, in which precision,
and when ranks talk to each other.
"""

import warnings
from contextlib import nullcontext
from functools import cached_property

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from maskalign.config import TokenBudget, as_schedule
from maskalign.training.compiling import compile_units


class Replicated(DistributedDataParallel):
    """DDP that shows the attributes of the model inside, so that the objective can ask it for its sizes."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


class Plan:
    """A model spread over the ranks of a placement.

    Args:
        model: the `SiT`, on the placement's device.
        config: `Config`.
        placement: `ranks.Placement`.

    """

    def __init__(self, model, config, placement):
        self.model = model
        self.mesh, self.device = placement.mesh, placement.device
        self.several = placement.world_size > 1
        self.kind = config.parallel.plan if placement.mesh is not None else "none"
        self.keep_gathered = not config.parallel.reshard_after_forward
        self.sharded = self.kind in ("fsdp", "hsdp")
        if self.sharded:
            mesh = self.mesh if self.kind == "hsdp" else self.mesh["shard"]
            shard_model(model, mesh, placement.dtype, config.parallel)
        self.idle = some_parameters_idle(config, model)

    @cached_property
    def forward(self):
        """What to call in training, with the model's signature; first used when parameters have their final dtype."""
        if self.kind != "ddp":
            return self.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer torch has two names for broadcast_buffers
            forward = Replicated(
                self.model,
                device_mesh=self.mesh["replicate"],
                gradient_as_bucket_view=True,
                find_unused_parameters=self.idle,
                broadcast_buffers=False,
                init_sync=False,  # every rank makes or loads the same weights
            )
        if next(self.model.parameters()).dtype == torch.bfloat16:
            forward.register_comm_hook(None, reduce_in_float32)
        return forward

    def micro_batch(self, last):
        """Context of one forward and backward; gradients are averaged over the ranks in the last one of a step."""
        if self.kind == "ddp" and not last:
            return self.forward.no_sync()
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
            self.model.set_is_last_backward(last)
            # What is kept between forward and backward may as well stay for the next micro-batch.
            self.model.set_reshard_after_backward(last or not self.keep_gathered)
        return nullcontext()

    def mean(self, values):
        """Mean of a small tensor over all ranks, in place."""
        if self.several:
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values

    def total(self, number):
        """Sum of an integer over all ranks."""
        if not self.several:
            return number
        value = torch.tensor(number, dtype=torch.int64, device=self.device)
        dist.all_reduce(value)
        return int(value)

    def most(self, *numbers):
        """The largest of all ranks, of each of some numbers, as floats."""
        if not self.several:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return values.tolist()

    def of_main(self, number):
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


def some_parameters_idle(config, model):
    """True where some steps of a run leave parameters without a gradient: the projectors once the alignment ends, the
    mask token once all tokens are kept."""
    weight, counts = as_schedule(config.method.align_weight), TokenBudget(config.method, model).ends
    ends = len(model.projectors) > 0 and 0 in weight.ends
    return ends or (model.fuse is not None and model.num_tokens in counts)


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
