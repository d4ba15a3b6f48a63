"""Philox-4x32-10 in Triton: four numbers from each hash of (key; column, row, stream)."""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 256  # hashes of a program: 1024 numbers


# The key and the places change with every step: a build for each of their kinds would stop the run in its middle.
@triton.jit(do_not_specialize=["key", "stream", "first", "quarter", "size"])
def keyed_random_kernel(out, key, stream, first, quarter, size, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """A part of one row; grid (rows, ceil(quarter / BLOCK)), quarter = ceil(size / 4).

    The four words of a hash stand a quarter of the row apart, so that each is written side by side with its neighbors.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], tl.int32)
    row = zero + (first + tl.program_id(0)).to(tl.int32)
    a, b, c, d = tl.philox(key, column, row, zero + stream.to(tl.int32), zero)
    a, b = tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b)
    c, d = tl.uint_to_uniform_float(c), tl.uint_to_uniform_float(d)
    if NORMAL:
        a, b = tl.pair_uniform_to_normal(a, b)
        c, d = tl.pair_uniform_to_normal(c, d)
    inside = column < quarter
    out += tl.program_id(0).to(tl.int64) * size
    tl.store(out + column, a, mask=inside & (column < size))
    tl.store(out + quarter + column, b, mask=inside & (quarter + column < size))
    tl.store(out + 2 * quarter + column, c, mask=inside & (2 * quarter + column < size))
    tl.store(out + 3 * quarter + column, d, mask=inside & (3 * quarter + column < size))


def launch(out, key, stream, first, normal):
    """Fill `out` (rows, size), contiguous float32."""
    rows, size = out.shape
    quarter = -(-size // 4)
    grid = (rows, -(-quarter // BLOCK))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        keyed_random_kernel[grid](out, key, stream, first, quarter, size, NORMAL=normal, BLOCK=BLOCK, num_warps=4)
