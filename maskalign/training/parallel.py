"""Where the work runs: device, precision, the ranks and their mesh. What a plan does to the model is in plans.py."""

import ctypes
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Optional

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from maskalign.config import ParallelConfig, shard_ranks
from maskalign.errors import UsageError
from maskalign.runtime import rounds


@dataclass(frozen=True)
class Placement:
    """Where this process stands.

    device: torch.device; dtype: of parameters and activations in forward and backward; rank, world_size, local_rank:
    as torchrun counts; mesh: DeviceMesh with the dimensions `replicate` and `shard`, None for the plan `none`.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    mesh: Optional[DeviceMesh] = None

    @property
    def is_main(self):
        """True on the one rank that writes logs, pictures and the bar."""
        return self.rank == 0


def place(training, parallel=None):
    """Choose device and dtype from the settings and, for a plan of several processes, join the other ranks.

    Args:
        training: `TrainingConfig`.
        parallel: `ParallelConfig`; by default one process.

    Raises:
        UsageError: where the device is not there, or the plan does not fit the processes that torchrun started.
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
    return Placement(device, dtype, rank, world_size, local_rank, make_mesh(device, parallel))


def find_device(name, setting="training.device"):
    """The device that a setting means: `auto`, `cpu`, `cuda`, `cuda:1`; of several GPUs the one of this rank.

    Raises:
        UsageError: where it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise UsageError(f"{setting}: {name!r} is not usable here ({why}); auto takes what there is") from None
    return device


def join_ranks(device, timeout=600):
    """Start the process group, with torchrun's ranks, or alone where there is no torchrun.

    The watchdog of failures.py ends a hung job after `timeout` seconds, and says more than torch's own time-out, which
    comes later. That one also covers the time in which rank 0 draws samples and the others wait for it.
    """
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        patience = timedelta(seconds=4 * timeout + 600)
        store, rank, world_size = rounds.join(patience)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=patience)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def leave_ranks(failed=False):
    """End the process group. After a failure the others may be stuck in a collective: only the process's end frees us
    then, and torchrun stops them."""
    if dist.is_initialized() and (not failed or dist.get_world_size() == 1):
        dist.destroy_process_group()


def make_mesh(device, parallel):
    """DeviceMesh (replicate, shard) of a plan: ddp is all replicas, fsdp all shards, hsdp replicas of shard groups."""
    world_size, local = dist.get_world_size(), os.environ.get("LOCAL_WORLD_SIZE")
    shards = shard_ranks(parallel, world_size, local and int(local))
    return init_device_mesh(device.type, (world_size // shards, shards), mesh_dim_names=("replicate", "shard"))


def compute_dtype(precision, device):
    """float32 or bfloat16; `auto` takes bfloat16 where the processor multiplies it natively."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def cpu_has_bf16():
    """True where the CPU has bf16 dot products (AVX512-BF16 or AMX); without them bf16 is emulated and slow."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def tune_host(device):
    """Process-wide settings that only change speed; call once before training.

    On a CPU glibc returns every large freed block to the kernel, and the next step pays for fresh zeroed pages; keeping
    them is worth several per cent of a step. float32 matmuls may take oneDNN's path ("medium"), which is exact to
    float32 on CPUs without AMX and faster than MKL on AMD processors.
    """
    if device.type != "cpu":
        torch.set_float32_matmul_precision("high")
        return
    if not torch.cpu.get_capabilities().get("amx_bf16"):
        torch.set_float32_matmul_precision("medium")
    m_trim_threshold, m_top_pad, m_mmap_max = -1, -2, -4
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 64 * 2**20)
    except (OSError, AttributeError):
        return  # another C library: nothing to tune
