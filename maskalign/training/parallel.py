"""Choose where a training run computes: a `runtime.ranks.Placement` from the settings. Plans are in plans.py."""

import os

import torch.distributed as dist

from maskalign.config import ParallelConfig, shard_ranks
from maskalign.errors import UsageError
from maskalign.runtime.device import compute_dtype, find_device
from maskalign.runtime.ranks import Placement, join_ranks, make_mesh


def make_placement(training, parallel=None):
    """Choose device and dtype from the settings and, for a plan of several processes, join the other ranks.

    Args:
        training: `TrainingConfig`.
        parallel: `ParallelConfig`; by default one process.

    Raises:
        UsageError: the device does not exist, or the plan does not fit the processes that torchrun started.
    """
    plan = (parallel or ParallelConfig()).plan
    rank, world_size, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if plan == "none" and world_size > 1:
        raise UsageError(
            f"parallel.plan: none runs in one process, but torchrun started {world_size}; set ddp, fsdp or hsdp"
        )
    device = find_device(training.device)
    dtype = compute_dtype(training.precision, device)
    if plan == "none":
        return Placement(device, dtype)
    join_ranks(device, training.timeout)
    # ddp is all replicas, fsdp all shards, hsdp replicas of shard groups.
    local = os.environ.get("LOCAL_WORLD_SIZE")
    shards = shard_ranks(parallel, dist.get_world_size(), local and int(local))
    return Placement(device, dtype, rank, world_size, local_rank, make_mesh(device, shards))
