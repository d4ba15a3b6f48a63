"""Choose the device and the precision, and set process-wide options that only change the speed."""

import ctypes
import os

import torch

from maskalign.errors import UsageError


def find_device(name, setting="training.device"):
    """The torch.device for a setting.

    Args:
        name: `auto`, `cpu`, `cuda` (this rank's GPU under torchrun), or one GPU, such as `cuda:1`.
        setting: name of the setting, for the message.

    Raises:
        UsageError: the device is not usable.
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
        raise UsageError(f"{setting}: {name!r} is not usable here ({why}); auto selects a usable device") from None
    return device


def compute_dtype(precision, device):
    """The torch.dtype for `fp32`, `bf16`, or `auto`: bfloat16 if the device multiplies it natively, else float32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if native else torch.float32
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def cpu_has_bf16():
    """True if the CPU has bf16 dot products (AVX512-BF16 or AMX); without them bf16 is emulated and slow."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def tune_host(device):
    """Process-wide settings that only change speed; call once before training.

    On a CPU, glibc returns every large freed block to the kernel, and the next step must wait for new zeroed pages.
    Keeping the blocks saves several per cent of a step. float32 matrix multiplications may use oneDNN ("medium"), which
    computes in full float32 on CPUs without AMX and is faster than MKL on AMD processors.
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
        return  # another C library, which has no mallopt
