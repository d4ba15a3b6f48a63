"""How the three operations are launched: configurations, launches, and the operators with their gradients.

The kernels, and what they compute, are in kernels.py.
"""

import torch

from ..operators import WARP_SIZE, kernel_op, wrap_triton
from ..rows import rows_contiguous
from ..transforms import differentiable, first_gradient
from ..tuning import choose
from .kernels import backward_kernel, forward_kernel, sums_kernel
from .naive import EPS

# ---- Configurations ----------------------------------------------------------------------------------------------


def _power_of_two(size):
    return 1 << max(0, size - 1).bit_length()


def _tiles(width, itemsize, most, threads):
    """(rows of a tile, its columns, threads) for 16 bytes per lane and at most `most` elements of a row per lane.

    The lanes of a row are the 32 of one warp where the row fits that limit.
    """
    per_lane = 16 // itemsize
    lanes = 32
    while -(-width // (lanes * per_lane)) * per_lane > most and lanes < 512:
        lanes *= 2
    block = min(lanes * per_lane, max(16, _power_of_two(width)))
    threads = max(threads, lanes)
    return max(1, threads * per_lane // block), block, threads


def forward_configs(width, narrow, wide):
    """Configurations of the forward; the first is the default: one warp per row, 8 rows per program.

    An eighth of a program's traffic with L2 is then the modulation, and the rest is rows.

    Args:
        width: D.
        narrow, wide: bytes per element of the narrowest and of the widest tensor of rows.
    """
    most = 40 if narrow < 4 else 32  # elements of a row per lane
    rows, block, threads = _tiles(width, narrow, most, 256)
    default = {"ROWS": rows, "BLOCK": block, "threads": threads}
    if narrow != wide:
        # Loads and stores are laid out differently, and exchanging lanes spills with any other number of rows.
        return [default]
    rows, block, threads = _tiles(width, narrow, most, 128)
    small = {"ROWS": rows, "BLOCK": block, "threads": threads}
    return _distinct([default, small, {**default, "ROWS": 2 * default["ROWS"]}])


def backward_configs(width, itemsize, vectors, has_subset):
    """Configurations of the backward; the first is the default.

    A row of 1152 takes two warps and a row of 768 one, and twice as many in float32, so that the row and its sums fit
    in the registers of the lanes.

    Few warps are resident, so the next rows are loaded into shared memory while the current ones are computed. With a
    subset this is not possible, because the next rows are known only after a search. A program writes one partial sum
    of each vector for all of its rows. The number of rows is such that writing the partial sums and reading them again
    adds about a tenth to the bytes of the rows; more rows would leave too few programs for a GPU.

    Args:
        width: D.
        itemsize: bytes per element of the narrowest tensor of rows.
        vectors: number of sums over the rows: 1 without the normalization, 2 without the residual, or 3.
        has_subset: whether there is a subset. Some of a program's rows are then only set to zero, so a program takes
            twice as many.
    """
    configs = []
    stages = 1 if has_subset else 2
    first, other = (24, 16) if itemsize < 4 else (16, 24)
    for most, ahead, more in ((first, stages, 1), (first, 1, 1), (other, 1, 1), (first, stages, 2)):
        tile, block, threads = _tiles(width, itemsize, most, 128)
        rows = max(16 if vectors != 2 and not has_subset else 32, tile)
        configs.append({"ROWS": more * rows, "TILE": tile, "BLOCK": block, "threads": threads, "STAGES": ahead})
    return _distinct(configs)


def _distinct(configs):
    return [config for i, config in enumerate(configs) if config not in configs[:i]]


SUMS = {"BLOCK_P": 16, "BLOCK": 128, "threads": 128}


HIP_STAGES = 1  # AMD's compiler would keep the next rows in registers, of which there are too few.


def look_up_block(config):
    """The number of subset entries compared at a time: at most 2048 comparisons per step, which fit in registers."""
    return max(16, min(128, 2048 // config["TILE"]))


def _options(config):
    """A configuration as the keyword arguments of a launch."""
    blocks = {k: v for k, v in config.items() if k != "threads"}
    if torch.version.hip and "STAGES" in blocks:
        blocks["STAGES"] = HIP_STAGES
    return blocks | {"num_warps": max(1, config["threads"] // WARP_SIZE), "num_stages": 1}


def _itemsizes(*tensors):
    """Bytes per element of the narrowest and of the widest of the tensors; None is ignored."""
    sizes = [t.dtype.itemsize for t in tensors if t is not None]
    return min(sizes), max(sizes)


def _cdiv(a, b):
    return (a + b - 1) // b


def _strides(tensor, dims):
    """The strides of a tensor's first `dims` dimensions; zeros for None."""
    return (0,) * dims if tensor is None else tensor.stride()[:dims]


# ---- Launches ----------------------------------------------------------------------------------------------------


def _forward(x, branch, gate, shift, scale, subset, dtype):
    """Launch the forward and return (y, u, mean, rstd): y is None without a branch, the others without a modulation."""
    B, N, D = x.shape
    K = N if subset is None else subset.shape[1]
    residual, norm = branch is not None, shift is not None
    y = x.new_empty((B, K, D)) if residual else None
    u = x.new_empty((B, K, D), dtype=dtype) if norm else None
    mean = x.new_empty((B, K), dtype=torch.float32) if norm else None
    rstd = x.new_empty((B, K), dtype=torch.float32) if norm else None
    if B * K * D == 0:
        return y, u, mean, rstd

    def launch(config):
        # x is passed in place of a missing tensor: the pointer is not used.
        pointers = [x if t is None else t for t in (branch, gate, shift, scale, subset, y, u, mean, rstd)]
        wrap_triton(forward_kernel)[(B * _cdiv(K, config["ROWS"]),)](
            x, *pointers, *_strides(x, 2), *_strides(branch, 2),
            *_strides(gate, 1), *_strides(shift, 1), *_strides(scale, 1), *_strides(subset, 1), K, EPS,
            D=int(D), HAS_SUBSET=subset is not None, RESIDUAL=residual, NORM=norm, **_options(config),
        )  # fmt: skip

    configs = forward_configs(int(D), *_itemsizes(x, branch, u))
    key = (int(D), x.dtype, residual, norm, subset is not None)
    launch(choose("adaln_forward", key, configs, x, launch))
    return y, u, mean, rstd


def _backward(dy, du, y, branch, gate, shift, scale, subset, mean, rstd, tokens):
    """Launch the backward and return (dx, dbranch, dgate, dshift, dscale).

    The gradient of an absent argument is None; dx is also None where it is equal to dy.
    """
    grads = dy if du is None else du
    B, K, D = grads.shape
    residual, norm = branch is not None, du is not None
    dx = grads.new_empty((B, tokens, D), dtype=(dy if y is None else y).dtype) if norm or subset is not None else None
    dbranch = branch.new_empty((B, K, D)) if residual else None
    sums = [t.new_empty((B, D)) for t in ((shift, scale) if norm else ()) + ((gate,) if residual else ())]
    dshift, dscale = sums[:2] if norm else (None, None)
    dgate = sums[-1] if residual else None
    if B * K * D == 0:
        for out in (dx, *sums):
            if out is not None:
                out.zero_()
        return dx, dbranch, dgate, dshift, dscale

    def launch(config):
        groups = _cdiv(tokens, config["ROWS"])
        parts = grads.new_empty((B, groups, len(sums), D), dtype=torch.float32)
        pointers = (dy, du, y, branch, gate, scale, mean, rstd, subset, dx, dbranch)
        wrap_triton(backward_kernel)[(B * groups,)](
            *(grads if t is None else t for t in pointers), parts,
            *_strides(dy, 2), *_strides(du, 2), *_strides(y, 2), *_strides(branch, 2),
            *_strides(gate, 1), *_strides(scale, 1), *_strides(subset, 1), tokens, K,
            D=int(D), HAS_SUBSET=subset is not None, RESIDUAL=residual, NORM=norm, HAS_DY=dy is not None,
            HAS_DX=dx is not None, BLOCK_K=look_up_block(config), **_options(config),
        )  # fmt: skip
        return parts

    configs = backward_configs(int(D), _itemsizes(dy, du, y, branch)[0], len(sums), subset is not None)
    key = (int(D), grads.dtype, residual, norm, subset is not None, dy is not None)
    parts = launch(choose("adaln_backward", key, configs, grads, launch))
    wrap_triton(sums_kernel)[(B * len(sums) * _cdiv(D, SUMS["BLOCK"]),)](
        parts, *(sums + 2 * sums[-1:])[:3], parts.shape[1], D=int(D), VECTORS=len(sums), **_options(SUMS)
    )
    return dx, dbranch, dgate, dshift, dscale


# ---- Operators ---------------------------------------------------------------------------------------------------


@kernel_op("maskalign_kernels::adaln_modulate")
def modulate_op(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, subset: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The modulated rows, and the mean and 1/std of each row."""
    return _forward(x, None, None, shift, scale, subset, dtype)[1:]


@kernel_op("maskalign_kernels::adaln_modulate_backward")
def modulate_backward_op(
    du: torch.Tensor, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, subset: torch.Tensor | None,
    mean: torch.Tensor, rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, shift, scale."""
    dx, _, _, dshift, dscale = _backward(
        None, du, x, None, None, shift, scale, subset, mean, rstd, x.shape[1]
    )  # fmt: skip
    return dx, dshift, dscale


def _modulate_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # Otherwise one launch per unused gradient would fill it with zeros.
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:4], *output[1:])


_modulate_gradients = first_gradient("adaln_modulate", modulate_backward_op)


def _modulate_grad(ctx, du, *_):
    return *_modulate_gradients(rows_contiguous(du), *ctx.saved_tensors), None, None


modulate = differentiable("adaln_modulate", modulate_op, _modulate_grad, _modulate_setup)


@kernel_op("maskalign_kernels::gated_residual")
def residual_op(x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, subset: torch.Tensor | None) -> torch.Tensor:
    return _forward(x, branch, gate, None, None, subset, None)[0]


@kernel_op("maskalign_kernels::gated_residual_backward")
def residual_backward_op(
    dy: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, subset: torch.Tensor | None, tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, branch, gate. The first is dy without a subset, and an empty tensor is returned for it."""
    dx, dbranch, dgate, _, _ = _backward(dy, None, None, branch, gate, None, None, subset, None, None, tokens)
    return dy.new_empty((0,)) if dx is None else dx, dbranch, dgate


def _residual_setup(ctx, inputs, output):
    x, branch, gate, subset = inputs
    ctx.tokens = x.shape[1]
    ctx.save_for_backward(branch, gate, subset)


_residual_gradients = first_gradient("gated_residual", residual_backward_op)


def _residual_grads(dy, branch, gate, subset, tokens):
    dx, dbranch, dgate = _residual_gradients(rows_contiguous(dy), branch, gate, subset, tokens)
    return dy if subset is None else dx, dbranch, dgate


def _residual_grad(ctx, dy):
    return *_residual_grads(dy, *ctx.saved_tensors, ctx.tokens), None


residual = differentiable("gated_residual", residual_op, _residual_grad, _residual_setup)


@kernel_op("maskalign_kernels::gated_residual_adaln")
def residual_modulate_op(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor,
    subset: torch.Tensor | None, dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The rows with the branch added, the same rows modulated, and the mean and 1/std of each row."""
    return _forward(x, branch, gate, shift, scale, subset, dtype)


@kernel_op("maskalign_kernels::gated_residual_adaln_backward")
def residual_modulate_backward_op(
    dy: torch.Tensor | None, du: torch.Tensor, y: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor,
    shift: torch.Tensor, scale: torch.Tensor, subset: torch.Tensor | None, mean: torch.Tensor, rstd: torch.Tensor,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of x, branch, gate, shift, scale."""
    return _backward(dy, du, y, branch, gate, shift, scale, subset, mean, rstd, tokens)


def _residual_modulate_setup(ctx, inputs, output):
    x, branch, gate, shift, scale, subset, _ = inputs
    y, _, mean, rstd = output
    ctx.tokens = x.shape[1]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(y, branch, gate, shift, scale, subset, mean, rstd)


_residual_modulate_gradients = first_gradient("gated_residual_adaln", residual_modulate_backward_op)


def _residual_modulate_grad(ctx, dy, du, *_):
    saved = ctx.saved_tensors  # Read only once: activation checkpointing allows a single access.
    if du is None:  # The modulated rows are not used.
        _, branch, gate, _, _, subset, _, _ = saved
        return *_residual_grads(dy, branch, gate, subset, ctx.tokens), None, None, None, None
    dy = None if dy is None else rows_contiguous(dy)
    return *_residual_modulate_gradients(dy, rows_contiguous(du), *saved, ctx.tokens), None, None


residual_modulate = differentiable(
    "gated_residual_adaln", residual_modulate_op, _residual_modulate_grad, _residual_modulate_setup
)
