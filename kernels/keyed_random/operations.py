"""Random numbers that are a function of a key and of their position, for draws that must not depend on rank or device.

A sequential generator would need a generator, and several launches, per image or group of images. A counter-based
generator needs no state: number (row, column) of a stream is a hash of the key, the row, the column and the stream. One
launch draws all rows, on any device and rank.
"""

import torch

from ..runtime import use_triton
from . import naive


def keyed_random(key, stream, first, rows, size, *, normal=False, device=None):
    """Rows [first, first + rows) of a table of random numbers. A row depends only on (key, stream, row, size, normal).

    The generator is Philox-4x32-10 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011) with the key
    as its 64-bit key and (column, row, stream) as its counter. Normal numbers are computed from two uniform ones by the
    Box-Muller transform.

    Args:
        key: int in [0, 2^63).
        stream: int in [0, 2^31). Different streams give independent numbers under the same key.
        first, rows: ints in [0, 2^31).
        size: numbers per row. Tables of different sizes have different numbers.
        normal: draw standard normal numbers instead of uniform ones in [0, 1).
        device: a CUDA or ROCm device runs the kernel; the CPU runs naive.py.

    Returns:
        (rows, size) float32.
    """
    out = torch.empty((rows, size), dtype=torch.float32, device=device)
    if out.numel() == 0:
        return out
    if not use_triton(out):
        return naive.keyed_random(key, stream, first, rows, size, is_normal=normal, device=device)
    from .kernels import launch  # Triton, which takes a moment to import.

    launch(out, key, stream, first, normal)
    return out
