"""The processes of torchrun: joining and leaving the process group, the mesh of a plan, and work shared without a mesh.

`Placement`, `join_ranks` and `make_mesh` are for training. `Ranks` and `torchrun_ranks` are for sampling, where batches
are distributed over the ranks and only results are exchanged.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from maskalign.runtime import rounds

# A rank may draw for hours before it exchanges anything with the others.
PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Placement:
    """The device and rank of this process.

    device: torch.device; dtype: dtype of parameters and activations in forward and backward; rank, world_size,
    local_rank: as in torchrun; mesh: DeviceMesh with the dimensions `replicate` and `shard`, None for the plan `none`.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    mesh: Optional[DeviceMesh] = None

    @property
    def is_main(self):
        """True on rank 0, which writes logs and images and shows the progress bar."""
        return self.rank == 0


def join_ranks(device, timeout=600):
    """Start the process group with torchrun's ranks, or with this process alone without torchrun.

    The watchdog of training ends a hung job after `timeout` seconds with a detailed message. torch's own time-out is
    longer, so that it comes later, and so that the other ranks can wait while rank 0 draws samples.

    Args:
        device: torch.device of this rank.
        timeout: time limit of the watchdog in seconds.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        allocator = "".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
        if "expandable_segments:True" in allocator:
            # NCCL cannot register such memory for the collectives of a captured CUDA graph.
            os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        patience = timedelta(seconds=4 * timeout + 600)
        store, rank, world_size = rounds.join(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave_ranks(failed=False):
    """End the process group, if it can be ended.

    After a failure the other ranks may be waiting in a collective, and ending the group would hang. The process then
    exits without it, and torchrun stops the others.
    """
    if dist.is_initialized() and (not failed or dist.get_world_size() == 1):
        dist.destroy_process_group()


def make_mesh(device, shards):
    """DeviceMesh (replicate, shard) over all ranks, with `shards` ranks in each shard group."""
    return init_device_mesh(
        device.type, (dist.get_world_size() // shards, shards), mesh_dim_names=("replicate", "shard")
    )


class Ranks:
    """Collective operations of this process and the others; they do nothing in a single process."""

    def __init__(self, rank=0, world_size=1):
        self.rank, self.world_size = rank, world_size

    def barrier(self):
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()

    def gather(self, value):
        """The list of all ranks' values in the order of ranks, on every rank; values can be anything that pickles."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, items, function):
        """[function(item) for item in items] on every rank, where each item is computed by one rank."""
        mine = [function(item) for item in items[self.rank :: self.world_size]]
        parts = [iter(part) for part in self.gather(mine)]
        return [next(parts[number % self.world_size]) for number in range(len(items))]


@contextmanager
def torchrun_ranks():
    """Context with the `Ranks` of torchrun, or of a single process. The process group ends with the context."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        yield Ranks()
        return
    # gloo is used with GPUs too, because only finished images are sent.
    store, rank, world_size = rounds.join(PATIENCE)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
    yield Ranks(dist.get_rank(), world_size)
    # This is skipped after an error: the other ranks may be inside a collective, and torchrun ends them.
    dist.destroy_process_group()
