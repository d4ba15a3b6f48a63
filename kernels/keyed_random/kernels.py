"""Philox-4x32-10 in Triton: each hash of (key; column, row, stream) gives four numbers."""

import contextlib

import torch
import triton
import triton.language as tl

BLOCK = 256  # hashes per program, which give 1024 numbers


# These integers change with every step. Specializing on their values would recompile the kernel in the middle of a run.
@triton.jit(do_not_specialize=["key", "stream", "first", "quarter", "size"])
def keyed_random_kernel(out, key, stream, first, quarter, size, NORMAL: tl.constexpr, BLOCK: tl.constexpr):
    """Fill a part of one row; grid (rows, ceil(quarter / BLOCK)), quarter = ceil(size / 4).

    The four words of a hash are stored a quarter of the row apart, so that neighboring lanes write neighboring numbers.
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
    """Fill `out` (rows, size), contiguous float32, with the numbers of operations.keyed_random."""
    rows, size = out.shape
    quarter = -(-size // 4)
    grid = (rows, -(-quarter // BLOCK))
    with torch.cuda.device(out.device) if out.is_cuda else contextlib.nullcontext():
        keyed_random_kernel[grid](out, key, stream, first, quarter, size, NORMAL=normal, BLOCK=BLOCK, num_warps=4)
