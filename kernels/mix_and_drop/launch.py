"""How mix_and_drop is launched: tiles, launches, and the operator with its gradient.

The kernels, and what they compute, are in kernels.py.
"""

import functools

import torch

from ..operators import WARP_SIZE, kernel_op, tl, wrap_triton
from ..rows import rows_contiguous
from ..runtime import INTERPRET
from ..transforms import differentiable, first_gradient
from ..tuning import choose
from .kernels import hidden_grad_kernel, mix_kernel, statistics_kernel, token_grad_kernel, weight_sums_kernel

EPS = 1e-6

# ---- Tiles -------------------------------------------------------------------------------------------------------


def _power_of_two(size):
    return 1 << max(0, size - 1).bit_length()


def _block_t(T):
    return max(16, _power_of_two(T))


def statistics_configs(D):
    """Configurations of `statistics`; the first is the default.

    For 256 < D <= 2048, one warp reads a row, in as many loads of 16 bytes per lane as the row takes. It reads 256
    columns per step, so lanes are idle only in the last step, and sums stay within the warp. The warps of a program
    share a longer row; a program takes many rows where they are shorter. Rows of up to 8192 elements are read once. On
    an H200 (D = 1152, Triton 3.6), the default takes 13.6 us. It takes 14.7 and 15.6 us where two and four warps share
    a row, and 65 and 227 us with two and four rows in steps.
    """
    whole = min(8192, max(16, _power_of_two(D)))
    if whole > 2048:  # Too many registers for one warp.
        shapes = [(1, whole, 256 if whole > 4096 else 128)]
    elif whole > 256:
        # Where warps share a row, each part must be wide enough for 16 bytes per lane in bfloat16.
        shapes = [(1, 256, 32), *((1, 8 * threads, threads) for threads in (64, 128) if 8 * threads <= whole)]
    else:
        shapes = [(2048 // whole, whole, 128)]
    return [
        {"ROWS": r, "STEPS": whole // b, "BLOCK_D": b, "threads": t, "stages": 1, "WHOLE": D <= whole}
        for r, b, t in dict.fromkeys(shapes)
    ]


def _configs(T, product_dtype, table):
    """The configurations of `table` for a hidden width; the first is the default.

    `table` maps a padded width to rows (BLOCK_N, BLOCK_K, BLOCK_D, threads, stages). Compiled for every target, none of
    them spills, and each thread reads 16 bytes of a row. The launches are bound by latency, not by arithmetic, so the
    defaults keep many loads in flight: several programs per processor, two or three steps of a loop, and a grid of at
    least one program per processor at XL/2's sizes. Wider tiles read the weights less often from L2. Float32 operands
    take twice the space, so there is one configuration with a narrower tile.
    """
    width = max(64, _block_t(T))
    names = ("BLOCK_N", "BLOCK_K", "BLOCK_D", "threads", "stages")
    configs = [dict(zip(names, row, strict=True)) for row in table[width]]
    if product_dtype == torch.float32:
        first = configs[0]
        return [first | {"BLOCK_D": min(32, max(16, first["BLOCK_D"] // 2)), "stages": min(2, first["stages"])}]
    return configs


def mix_configs(T, N, product_dtype, x, weight):
    """Configurations of `mix`, as described in `_configs`; `x` and `weight` are dtypes."""
    # The kept rows are read a second time from L2, so the tiles in flight, with N rows each, must fit in it.
    narrow, deep = (64, 64, 32, 256, 2), (64, 64, 32, 256, 3)
    if product_dtype == torch.float32:
        return _configs(T, product_dtype, dict.fromkeys((64, 128, 256), [(64, 64, 64, 256, 2)]))
    few = {64: [(64, 64, 64, 128, 3), (64, 128, 64, 128, 3), (64, 32, 64, 128, 2)], 128: [deep, narrow], 256: [narrow]}
    if torch.float32 in (x, weight) and product_dtype != torch.float32:  # Autocast: wide tiles do not fit on gfx942.
        few[64] = [(32, 64, 64, 256, 2)]
    many = {64: [narrow], 128: [narrow], 256: [narrow]}
    return _configs(T, product_dtype, few if N <= 512 else many)


def hidden_configs(T, product_dtype, weight):
    """Configurations of `hidden`, as described in `_configs`; `weight` is the dtype of the weights."""
    small, deep, narrow = (64, 64, 32, 128, 3), (64, 128, 32, 256, 3), (64, 64, 32, 256, 2)
    # With float32 weights under autocast, more loads in flight do not fit on gfx942.
    few = [(64, 128, 32, 256, 2)] if weight == torch.float32 else [small, deep]
    return _configs(T, product_dtype, {64: few, 128: [narrow], 256: [(128, 128, 16, 256, 1)]})


def token_launches(T, product_dtype):
    """(FIRST, SECOND, configurations) of each launch of `tokens`: two launches where the operands are too large for
    one.

    BLOCK_K is the number of kept rows that are compared with a tile's tokens at a time. More than 64 use up AMD's
    scalar registers.
    """
    one, two, three = ((32, 64, 64, 256, stages) for stages in (1, 2, 3))
    together = _configs(T, product_dtype, {64: [three, two], 128: [two, three], 256: [two]})
    if _block_t(T) <= 128 and product_dtype != torch.float32:
        return [(True, True, together)]
    first = _configs(T, product_dtype, {64: [one], 128: [one], 256: [(16, 16, 128, 256, 1)]})
    return [(True, False, first), (False, True, _configs(T, product_dtype, dict.fromkeys((64, 128, 256), [one])))]


def images_per_program(B, blocks, T, D):
    """The number of images whose weight gradients one program adds into one partial sum.

    It is the largest number that leaves 512 programs to fill a GPU. Where the hidden width is large relative to the
    model's, the partial sums would be more than a tenth of the bytes of the rows; the number is then larger, as long as
    128 programs are left.

    Args:
        B: number of images.
        blocks: tiles of tokens per image.
        T, D: the hidden width and the width of the tokens.
    """
    programs = B * blocks
    return max(1, programs // 512, min(round(20 * T / D), programs // 128))


# The sums of the weight gradients: 16 partial sums at a time, 16 bytes per lane, one program per 128 numbers.
SUMS = {"BLOCK_P": 16, "BLOCK": 128, "threads": 128, "stages": 1}


def weight_sums_programs(N, T):
    """The number of programs that add up the weight gradients: the tiles of dw1, dw2, db2 and db1."""
    return 2 * _cdiv(T * N, SUMS["BLOCK"]) + _cdiv(N, SUMS["BLOCK"]) + _cdiv(T, SUMS["BLOCK"])


HIP_STAGES = 2  # More stages do not fit in the registers or the shared memory of gfx942.


def _options(config):
    """A configuration as the keyword arguments of a launch."""
    blocks = {k: v for k, v in config.items() if k not in ("threads", "stages")}
    stages = min(HIP_STAGES, config["stages"]) if torch.version.hip else config["stages"]
    return blocks | {"num_warps": max(1, config["threads"] // WARP_SIZE), "num_stages": stages}


# ---- Launches ----------------------------------------------------------------------------------------------------


def _precision(product_dtype):
    """How float32 operands are multiplied: as three TF32 products on NVIDIA, whose matrix units have no float32."""
    if INTERPRET:
        return "widened"
    return "tf32x3" if product_dtype == torch.float32 and torch.version.hip is None else "ieee"


def _tl(dtype):
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _constants(x, w1, subset, product_dtype):
    """The constexprs of a launch. The model's sizes are among them, so that masks that are always true cost nothing."""
    return {
        "N": int(x.shape[1]), "D": int(x.shape[2]), "T": int(w1.shape[0]), "HAS_SUBSET": subset is not None,
        "PRODUCT_DTYPE": _tl(product_dtype), "PRECISION": _precision(product_dtype),
        "BLOCK_T": _block_t(int(w1.shape[0])),
    }  # fmt: skip


def _key(x, w1, subset, product_dtype):
    """What the best configuration depends on. The batch size and K are left out, because they may be symbolic."""
    return int(x.shape[1]), int(x.shape[2]), int(w1.shape[0]), subset is not None, x.dtype, product_dtype


def _cdiv(a, b):
    return (a + b - 1) // b


def _index(x, subset):
    """The subset and its first stride. Without a subset, x is passed as a pointer that is not read."""
    return (x, 0) if subset is None else (subset, subset.stride(0))


@kernel_op("maskalign_kernels::mix_and_drop")
def mix_op(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor,
    w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    subset: torch.Tensor | None, product_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The kept rows, and the mean and 1/std of all rows."""
    B, N, D = x.shape
    K = N if subset is None else subset.shape[1]
    mean = x.new_empty((B, N), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    out = x.new_empty((B, K, D))
    if out.numel() == 0:
        return out, mean.zero_(), rstd.zero_()

    def statistics(config):
        wrap_triton(statistics_kernel)[(_cdiv(B * N, config["ROWS"]),)](
            x, mean, rstd, x.stride(0), x.stride(1), B * N, N, D, EPS, **_options(config)
        )

    constants = _constants(x, w1, subset, product_dtype)
    index, stride_subset = _index(x, subset)

    def mix(config):
        wrap_triton(mix_kernel)[(B * _cdiv(D, config["BLOCK_D"]),)](
            x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, index, out,
            x.stride(0), x.stride(1), shift.stride(0), scale.stride(0), gate.stride(0),
            stride_subset, K, **constants, **_options(config),
        )  # fmt: skip

    statistics(choose("statistics", (constants["D"], x.dtype), statistics_configs(constants["D"]), x, statistics))
    configs = mix_configs(constants["T"], constants["N"], product_dtype, x.dtype, w1.dtype)
    mix(choose("mix", _key(x, w1, subset, product_dtype), configs, x, mix))
    return out, mean, rstd


@kernel_op("maskalign_kernels::mix_and_drop_backward")
def mix_backward_op(
    dout: torch.Tensor, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, gate: torch.Tensor,
    w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor, b2: torch.Tensor,
    subset: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor, product_dtype: torch.dtype,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
]:  # fmt: skip
    """Gradients of x, shift, scale, gate, w1, b1, w2, b2."""
    if dout.numel() == 0:
        return tuple(t.new_zeros(t.shape) for t in (x, shift, scale, gate, w1, b1, w2, b2))
    dshift, dscale, dgate, *between = _hidden_gradients(
        dout, x, shift, scale, gate, w1, b1, w2, b2, subset, mean, rstd, product_dtype
    )
    dx, parts = _token_gradients(dout, x, w1, subset, mean, rstd, product_dtype, *between)
    dw1, db1, dw2, db2 = (weight.new_empty(weight.shape) for weight in (w1, b1, w2, b2))
    T, N = int(w1.shape[0]), int(w1.shape[1])
    wrap_triton(weight_sums_kernel)[(weight_sums_programs(N, T),)](
        *parts, dw1, db1, dw2, db2, parts[0].shape[0], parts[2].shape[0], N=N, T=T, **_options(SUMS)
    )
    return dx, dshift, dscale, dgate, dw1, db1, dw2, db2


def _hidden_gradients(dout, x, shift, scale, gate, w1, b1, w2, b2, subset, mean, rstd, product_dtype):
    """Launch `hidden`.

    Returns dshift, dscale, dgate (B, D); the gated hidden activations and S (B, T, D); and per tile of D the sums of S
    and dA (B, tiles, 3, T) and of gate dout (B, tiles, K), float32.
    """
    B, N, D = x.shape
    T = w1.shape[0]
    dshift, dscale, dgate = (t.new_empty((B, D)) for t in (shift, scale, gate))
    hidden = x.new_empty((B, T, D), dtype=product_dtype)
    ds = torch.empty_like(hidden)
    constants = _constants(x, w1, subset, product_dtype)
    index, stride_subset = _index(x, subset)

    def launch(config):
        tiles = _cdiv(D, config["BLOCK_D"])
        sums = x.new_empty((B, tiles, 3, T), dtype=torch.float32)
        gated = x.new_empty((B, tiles, dout.shape[1]), dtype=torch.float32)
        wrap_triton(hidden_grad_kernel)[(B * tiles,)](
            dout, x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, index,
            dshift, dscale, dgate, hidden, ds, sums, gated,
            dout.stride(0), dout.stride(1), x.stride(0), x.stride(1),
            shift.stride(0), scale.stride(0), gate.stride(0), stride_subset, dout.shape[1],
            **constants, **_options(config),
        )  # fmt: skip
        return sums, gated

    configs = hidden_configs(constants["T"], product_dtype, w1.dtype)
    parts = launch(choose("hidden", _key(x, w1, subset, product_dtype), configs, x, launch))
    return dshift, dscale, dgate, hidden, ds, *parts


def _token_gradients(dout, x, w1, subset, mean, rstd, product_dtype, hidden, ds, sums, gated):
    """Launch `tokens`; returns dx and the partial sums of dw1, db1, dw2, db2, float32, one for each group of images."""
    B, N, D = x.shape
    T = w1.shape[0]
    dx = x.new_empty((B, N, D))
    constants = _constants(x, w1, subset, product_dtype)
    index, stride_subset = _index(x, subset)

    def launch(config, first, second):
        blocks = _cdiv(N, config["BLOCK_N"])
        images = images_per_program(B, blocks, T, D)
        groups = _cdiv(B, images)
        sizes = ((T, N), (T,), (N, T), (N,))
        parts = [x.new_empty((groups, *size), dtype=torch.float32) for size in sizes]
        wrap_triton(token_grad_kernel)[(groups * blocks,)](
            dout, x, mean, rstd, w1, index, hidden, ds, sums, gated, dx, *parts,
            dout.stride(0), dout.stride(1), x.stride(0), x.stride(1), stride_subset,
            B, dout.shape[1], sums.shape[1], images, FIRST=first, SECOND=second, **constants, **_options(config),
        )  # fmt: skip
        return parts

    for first, second, configs in token_launches(constants["T"], product_dtype):
        run = functools.partial(launch, first=first, second=second)
        key = (*_key(x, w1, subset, product_dtype), first, second)
        parts = run(choose("tokens", key, configs, x, run))
        if first:
            of_first = parts[:2]
        if second:
            of_second = parts[2:]
    return dx, [*of_first, *of_second]


# ---- Autograd ----------------------------------------------------------------------------------------------------


def _setup_context(ctx, inputs, output):
    *tensors, ctx.product_dtype = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # Otherwise one launch for each of mean and rstd would fill a gradient with zeros.
    ctx.save_for_backward(*tensors, mean, rstd)


_gradients = first_gradient("mix_and_drop", mix_backward_op)


def _backward(ctx, dout, *_):
    grads = _gradients(rows_contiguous(dout), *ctx.saved_tensors, ctx.product_dtype)
    return *grads, None, None


mix = differentiable("mix_and_drop", mix_op, _backward, _setup_context)
