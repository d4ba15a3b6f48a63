"""Which device computes, in which precision, and settings of the process that only change its speed."""

import ctypes
import os

import torch

from maskalign.errors import UsageError


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
