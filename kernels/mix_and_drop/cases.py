"""The launches of mix_and_drop for the compile report: arguments and configurations, bytes and FLOPs.

`moved` counts the traffic with DRAM: every tensor that a launch reads or writes, once. Repeated reads come from L2 and
are counted in `cached`:

    the weights, a few hundred kilobytes that all programs share
    a program's second reading of its tile of x (the kept rows in `mix`, all rows in `tokens`)
    the hidden activations and S of an image in `tokens`, read by the image's programs, which run at the same time

A test checks that this holds: for every target, the tiles of all programs that are resident at the same time, according
to the registers and shared memory of the builds, fit in L2. Another test counts loads and stores in the interpreter and
compares them with `moved` plus `cached`.
"""

import torch

from ..aot import Case
from . import kernels
from . import launch as mixer
from .operations import OP

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# Half of the smallest L2 (40 MiB on an A100), because its two partitions may hold copies of the same lines.
WARM = 20 << 20
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    # (images, tokens, kept, width, hidden, dtypes of x, weights and products). XL/2 in bfloat16 at every hidden width
    # and at 512 px, then autocast (float32 master weights; float32 residual stream), float16, float32, no subset, a
    # quarter of the tokens, and S/2.
    (32, 256, 128, 1152, 64, _BF16, _BF16, _BF16),
    (32, 256, 128, 1152, 128, _BF16, _BF16, _BF16),
    (32, 256, 128, 1152, 256, _BF16, _BF16, _BF16),
    (32, 1024, 512, 1152, 64, _BF16, _BF16, _BF16),
    (32, 1024, 512, 1152, 128, _BF16, _BF16, _BF16),
    (32, 1024, 512, 1152, 256, _BF16, _BF16, _BF16),
    (32, 256, 128, 1152, 64, _BF16, _FP32, _BF16),
    (32, 256, 128, 1152, 64, _FP32, _FP32, _BF16),
    (32, 256, 128, 1152, 64, _FP16, _FP16, _FP16),
    (32, 256, 128, 1152, 64, _FP32, _FP32, _FP32),
    (32, 256, None, 1152, 64, _BF16, _BF16, _BF16),
    (32, 256, 64, 1152, 64, _BF16, _BF16, _BF16),
    (32, 256, 128, 384, 64, _BF16, _BF16, _BF16),
]


def aot_cases(shapes=None, every_configuration=True):
    """Yield a Case for every launch, forward and backward."""
    for shape in shapes or SHAPES:
        for direction, launch, kernel, configs in _launches(shape):
            for number, config in enumerate(configs if every_configuration else configs[:1]):
                yield _case(shape, direction, launch, kernel, config, number)


def _launches(shape):
    _, tokens, _, width, hidden, x, weight, product_dtype = shape
    yield "forward", "statistics", kernels.statistics_kernel, mixer.statistics_configs(width)
    yield "forward", "mix", kernels.mix_kernel, mixer.mix_configs(hidden, tokens, product_dtype, x, weight)
    yield "backward", "hidden", kernels.hidden_grad_kernel, mixer.hidden_configs(hidden, product_dtype, weight)
    for first, second, configs in mixer.token_launches(hidden, product_dtype):
        launch = "tokens" if first and second else "tokens first" if first else "tokens second"
        yield "backward", launch, kernels.token_grad_kernel, configs
    yield "backward", "sums", kernels.weight_sums_kernel, [mixer.SUMS]


def _case(shape, direction, launch, kernel, config, number):
    B, N, K, D, T, x, weight, product_dtype = shape
    kept = N if K is None else K
    blocks = -(-N // config.get("BLOCK_N", N))
    images = mixer.images_per_program(B, blocks, T, D)
    # The tiles of `hidden`, which writes one partial sum per tile. `tokens` adds those of the default configuration.
    tiles = -(-D // (config if launch == "hidden" else mixer.hidden_configs(T, product_dtype, weight)[0])["BLOCK_D"])
    grid = {
        "statistics": (-(-B * N // config.get("ROWS", 1)), 1),
        "tokens": (blocks, -(-B // images)),
        "sums": (mixer.weight_sums_programs(N, T), 1),
    }.get(launch.split()[0]) or (-(-D // config["BLOCK_D"]), B)
    weights = ("w1", "b1", "w2", "b2")
    # The weights' gradients are partial sums in float32 until the last launch, which writes them in the weights' dtype.
    gradients = dict.fromkeys([f"d{name}" for name in weights], _pointer(weight) if launch == "sums" else "*fp32")
    types = dict.fromkeys(("mean", "rstd", "sums", "gated", *(f"d{name}_parts" for name in weights)), "*fp32")
    types |= dict.fromkeys(("hidden", "ds"), _pointer(product_dtype)) | dict.fromkeys(weights, _pointer(weight))
    types |= gradients | {"subset": "*i64"}
    first_groups, second_groups = _groups(shape)
    numbers = {
        "K": kept, "B": B, "tiles": tiles, "images": images, "total": B * N, "eps": mixer.EPS, "stride_xb": N * D,
        "stride_xn": D, "stride_gb": kept * D, "stride_gk": D, "stride_shift": 3 * D, "stride_scale": 3 * D,
        "stride_gate": 3 * D, "stride_subset": kept, "N": N, "D": D,
        "first_groups": first_groups, "second_groups": second_groups,
    }  # fmt: skip
    constexprs = {k: v for k, v in config.items() if k not in ("threads", "stages")}
    if launch == "sums":
        constexprs |= {"N": N, "T": T}
    elif launch != "statistics":
        numbers = {k: v for k, v in numbers.items() if k not in ("N", "D")}
        constexprs |= {
            "N": N, "D": D, "T": T, "BLOCK_T": mixer._block_t(T), "HAS_SUBSET": K is not None,
            "PRODUCT_DTYPE": mixer._tl(product_dtype),
            "PRECISION": "tf32x3" if product_dtype == torch.float32 else "ieee",
        }  # fmt: skip
    if launch.startswith("tokens"):
        constexprs |= {"FIRST": launch != "tokens second", "SECOND": launch != "tokens first"}
    arguments = {}
    for name in kernel.arg_names:
        if name not in constexprs:
            arguments[name] = numbers[name] if name in numbers else types.get(name, _pointer(x))
    moved, cached, flops = _cost(shape, launch, config, grid, tiles)
    return Case(
        operation=OP, direction=direction, launch=launch,
        shape=f"B{B} N{N} K{K} D{D} T{T} {_TYPES[x]}/{_TYPES[weight]}/{_TYPES[product_dtype]}",
        config=" ".join(f"{k}={v}" for k, v in config.items()) if number else "default",
        kernel=kernel, arguments=arguments, constexprs=constexprs, num_warps=config["threads"] // 32,
        hip_constexprs={"PRECISION": "ieee"} if "PRECISION" in constexprs else {},
        waves=max(1, config["threads"] // 64),
        num_stages=config["stages"], hip_stages=min(mixer.HIP_STAGES, config["stages"]), grid=(grid[0] * grid[1],),
        moved=moved, least=_least(shape, launch, tiles), cached=cached, warm=_warm(shape, launch), flops=flops,
        rows=("x", "dout", "out", "dx"),
    )  # fmt: skip


def _groups(shape):
    """[groups of images with partial sums of dw1, the same for dw2], for the default configurations of `tokens`."""
    B, N, _, D, T, _, _, product_dtype = shape
    groups = [0, 0]
    for first, second, configs in mixer.token_launches(T, product_dtype):
        count = -(-B // mixer.images_per_program(B, -(-N // configs[0]["BLOCK_N"]), T, D))
        groups = [count if computed else g for computed, g in zip((first, second), groups, strict=True)]
    return groups


def _pointer(dtype):
    return "*" + _TYPES[dtype]


def _cost(shape, launch, config, grid, tiles):
    """(moved, cached, floating-point operations) of one launch."""
    B, N, K, D, T, x, weight, product_dtype = shape
    kept, index = (N, 0) if K is None else (K, 8 * B * K)
    rows, out, vector = B * N * D * x.itemsize, B * kept * D * x.itemsize, B * D * x.itemsize
    statistics = 8 * B * N
    first, second = 2 * B * T * N * D, 2 * B * T * kept * D  # The two products.
    if launch == "statistics":
        return rows + statistics, 0, 5 * B * N * D

    weights = (2 * T * N + T + N) * weight.itemsize
    if launch == "mix":
        moved = rows + out + statistics + index + 3 * vector + weights
        again = (grid[0] - 1) * (statistics + index) + out
        return moved, again + _weights_again(shape, grid), first + second

    between = 2 * B * T * D * product_dtype.itemsize  # H and S.
    if launch == "hidden":
        partial = 4 * B * tiles * (kept + 3 * T)
        moved = rows + out + statistics + index + 6 * vector + weights + between + partial
        again = (grid[0] - 1) * (statistics + index)
        return moved, again + _weights_again(shape, grid), first + second

    if launch == "sums":
        first_groups, second_groups = _groups(shape)
        numbers = first_groups * (T * N + T) + second_groups * (T * N + N)
        return 4 * numbers + weights, 0, numbers

    blocks, groups = grid
    moved, again, flops = out + index, (blocks - 1) * index, 0
    if launch != "tokens second":
        sums, matrix = 8 * B * tiles * T, T * N * weight.itemsize
        # Of the three sums, that of dA is read by the first program of a group only.
        moved += 2 * rows + statistics + matrix + between // 2 + sums + sums // 2 + 4 * groups * (T * N + T)
        again += rows + (2 * blocks - 1) * between // 2 + (blocks - 1) * sums + (groups - 1) * matrix
        if mixer._block_t(T) > 128:  # w1 is read again between the loops and in every step of the second loop.
            again += B * (1 + -(-D // config["BLOCK_D"])) * matrix
        flops += 2 * first
    if launch != "tokens first":
        moved += between // 2 + 4 * B * tiles * kept + 4 * groups * (T * N + N)
        again += (blocks - 1) * (between // 2)
        flops += first
    return moved, again, flops


def _least(shape, launch, tiles):
    """The least bytes that a launch can move: its inputs and results once, for any tiles.

    This is counted independently of `_cost`, tensor by tensor, so that the report shows the cost of tiles: partial sums
    per tile or per group of images that a later launch adds up. `tiles` is the number of tiles of `hidden`, whose
    partial sums are an input of `tokens`.
    """
    B, N, K, D, T, x, weight, product_dtype = shape
    tokens, kept = B * N * D * x.itemsize, B * (K or N) * D * x.itemsize
    vector, hidden = B * D * x.itemsize, B * T * D * product_dtype.itemsize
    w1 = w2 = T * N * weight.itemsize
    b1, b2 = T * weight.itemsize, N * weight.itemsize
    mean = rstd = 4 * B * N
    subset = 8 * B * K if K else 0
    if launch == "statistics":  # x -> mean, rstd
        return tokens + mean + rstd
    if launch == "mix":  # x, mean, rstd, shift, scale, gate, w1, b1, w2, b2, subset -> out
        return tokens + mean + rstd + 3 * vector + w1 + b1 + w2 + b2 + subset + kept
    gated = 4 * B * (K or N)  # sums along D that db2 needs, one per kept row
    sums = 4 * B * 3 * T  # sums along D for the gradients of w1 and x, three for each hidden token
    if launch == "hidden":  # the same and dout -> dshift, dscale, dgate, the activations and their gradient, the sums
        inputs = kept + tokens + mean + rstd + 3 * vector + w1 + b1 + w2 + b2 + subset
        return inputs + 3 * vector + 2 * hidden + gated + sums
    if launch == "sums":  # partial sums of dw1, db1, dw2, db2 -> dw1, db1, dw2, db2
        of_dw1, of_dw2 = _groups(shape)
        return of_dw1 * 4 * (T * N + T) + of_dw2 * 4 * (N * T + N) + w1 + b1 + w2 + b2
    least = kept + subset
    if launch != "tokens second":  # dout, x, mean, rstd, w1, ds, partial sums -> dx, dw1, db1
        least += 2 * tokens + mean + rstd + w1 + hidden + tiles * sums + 4 * (T * N + T)
    if launch != "tokens first":  # dout, the gated activations, partial sums of db2 -> dw2, db2
        least += hidden + tiles * gated + 4 * (T * N + N)
    return least


def _warm(shape, launch):
    """Bytes of x that `statistics` has read and that `mix`, which takes the images in reverse order, finds in L2.

    Between the two readings of a row, the rows after it are read and the corresponding outputs written. A row is still
    in L2 if both together fit in WARM.
    """
    if launch != "mix":
        return 0
    B, N, K, D, _, x, _, _ = shape
    rows, out = B * N * D * x.itemsize, B * (K or N) * D * x.itemsize
    return min(rows, WARM * rows // (rows + out))


def _weights_again(shape, grid):
    """Bytes of weights that the programs of `mix` and `hidden` load, without the first time."""
    _, N, K, _, T, _, weight, _ = shape
    kept = N if K is None else K
    each = T * N + T + kept * T + kept
    return (grid[0] * grid[1] * each - (2 * T * N + T + N)) * weight.itemsize
