"""The launches of the three operations for the compile report: arguments and configurations, bytes and FLOPs.

`moved` counts the traffic with DRAM: every tensor that a launch reads or writes, once. Repeated reads are counted in
`cached`: an image's shift, scale and gate, a few kilobytes that every row of the image loads (the programs of an image
run at the same time), and in the backward with a subset the image's indices, which each program searches. A test counts
loads and stores in the interpreter and compares them with `moved` plus `cached`.
"""

import torch

from ..aot import Case
from . import kernels
from . import launch as adaln

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    # (images, tokens, rows or None, width, dtype of x, dtype of branch, vectors and modulated rows). XL/2 with a class
    # token: all rows, and three quarters of the patches as in the last mixing layer. Then a quarter of the rows, other
    # dtypes, the other presets, and the longest row.
    (32, 257, None, 1152, _BF16, _BF16),
    (32, 257, 193, 1152, _BF16, _BF16),
    (32, 256, 64, 1152, _BF16, _BF16),
    (32, 257, None, 1152, _FP16, _FP16),
    (32, 257, 193, 1152, _FP32, _BF16),
    (32, 257, None, 1152, _FP32, _FP32),
    (32, 257, 193, 1152, _FP32, _FP32),
    (32, 257, None, 1024, _BF16, _BF16),
    (32, 257, None, 768, _BF16, _BF16),
    (32, 257, None, 384, _BF16, _BF16),
    (8, 257, None, 4096, _BF16, _BF16),
    (8, 257, 193, 4096, _FP32, _FP32),
]


class Operation:
    """One of the three operations in the form that the report expects: SHAPES, and a Case for every launch on them."""

    SHAPES = SHAPES

    def __init__(self, name):
        self.name = name

    def aot_cases(self, shapes=None, every_configuration=True):
        """Yield a Case for every launch, forward and backward."""
        for shape in shapes or SHAPES:
            for direction, launch, configs in launches(self.name, shape):
                for number, config in enumerate(configs if every_configuration else configs[:1]):
                    yield _case(self.name, shape, direction, launch, config, number)


OPERATIONS = {name: Operation(name) for name in ("adaln_modulate", "gated_residual", "gated_residual_adaln")}


def launches(operation, shape):
    """(direction, launch, configurations) of an operation's launches on one of SHAPES."""
    _, _, kept, width, x, branch = shape
    narrow = min(x.itemsize, branch.itemsize)
    flags = _flags(operation)
    yield "forward", "forward", adaln.forward_configs(width, narrow, max(x.itemsize, branch.itemsize))
    yield "backward", "backward", adaln.backward_configs(width, narrow, _vectors(**flags), kept is not None)
    yield "backward", "sums", [adaln.SUMS]


def _flags(operation):
    return {"residual": operation != "adaln_modulate", "norm": operation != "gated_residual"}


def _vectors(residual, norm):
    return residual + 2 * norm


def _groups(shape):
    """A function of the number of summed vectors: how many partial sums per image the default backward writes."""
    _, tokens, kept, width, x, branch = shape
    narrow = min(x.itemsize, branch.itemsize)

    def groups(vectors):
        return -(-tokens // adaln.backward_configs(width, narrow, vectors, kept is not None)[0]["ROWS"])

    return groups


def _case(operation, shape, direction, launch, config, number):
    B, N, K, D, x, branch = shape
    flags = _flags(operation)
    residual, norm, vectors = flags["residual"], flags["norm"], _vectors(**flags)
    rows = N if K is None else K
    groups = -(-N // config["ROWS"]) if launch == "backward" else _groups(shape)(vectors)
    grid = {
        "forward": B * -(-rows // config.get("ROWS", 1)), "backward": B * groups,
        "sums": B * vectors * -(-D // config["BLOCK"]),
    }[launch]  # fmt: skip
    kernel = {"forward": kernels.forward_kernel, "backward": kernels.backward_kernel, "sums": kernels.sums_kernel}
    kernel = kernel[launch]
    stream, other = _pointer(x), _pointer(branch)
    types = dict.fromkeys(("mean", "rstd", "parts"), "*fp32") | {"subset": "*i64" if K else stream}
    types |= dict.fromkeys(
        ("branch", "gate", "shift", "scale", "dbranch", "u", "du", "first", "second", "third"), other
    )
    types |= dict.fromkeys(("x", "y", "dx", "dy"), stream)
    numbers = {"stride_xb": N * D, "stride_xn": D, "N": N, "K": rows, "groups": groups, "eps": adaln.EPS}
    numbers |= {"stride_yb": (rows if residual else N) * D, "stride_yn": D}
    for name in ("b", "dy", "du"):
        numbers |= {f"stride_{name}b": rows * D, f"stride_{name}k": D}
    numbers |= dict.fromkeys(("stride_gate", "stride_shift", "stride_scale"), 6 * D)
    numbers["stride_subset"] = rows if K else 0
    constexprs = {k: v for k, v in config.items() if k != "threads"}
    constexprs |= {
        "D": D, "HAS_SUBSET": K is not None, "RESIDUAL": residual, "NORM": norm, "HAS_DY": residual,
        "HAS_DX": norm or K is not None, "VECTORS": vectors,
    }  # fmt: skip
    if launch == "backward":
        constexprs["BLOCK_K"] = adaln.look_up_block(config)
    names = kernel.arg_names
    moved, cached, least, flops = _cost(operation, shape, launch, config, groups)
    return Case(
        operation=operation, direction=direction, launch=launch,
        shape=f"B{B} N{N} K{K} D{D} {_TYPES[x]}/{_TYPES[branch]}",
        config=" ".join(f"{k}={v}" for k, v in config.items()) if number else "default",
        kernel=kernel, arguments={n: (numbers | types)[n] for n in names if n in numbers or n in types},
        constexprs={n: constexprs[n] for n in names if n in constexprs},
        num_warps=config["threads"] // 32, waves=config["threads"] // 64, num_stages=1, grid=(grid,),
        hip_constexprs={"STAGES": adaln.HIP_STAGES} if launch == "backward" else {},
        moved=moved, cached=cached, least=least, flops=flops,
        rows=("x", "y", "u", "dy", "du", "dx", "branch", "dbranch"),
    )  # fmt: skip


def _pointer(dtype):
    return "*" + _TYPES[dtype]


def _cost(operation, shape, launch, config, groups):
    """(moved, cached, least, floating-point operations) of one launch."""
    B, N, K, D, x, branch = shape
    flags = _flags(operation)
    residual, norm, vectors = flags["residual"], flags["norm"], _vectors(**flags)
    kept = N if K is None else K
    stream, rows, vector = B * kept * D * x.itemsize, B * kept * D * branch.itemsize, B * D * branch.itemsize
    index, statistics = 8 * B * kept if K else 0, 8 * B * kept
    parts = 4 * B * groups * vectors * D
    if launch == "sums":
        moved = parts + vectors * vector
        return moved, 0, moved, B * groups * vectors * D
    if launch == "forward":
        moved = stream + index  # x
        if residual:
            moved += rows + stream + vector  # branch, gate -> y
        if norm:
            moved += rows + statistics + 2 * vector  # shift, scale -> u, mean, rstd
        return moved, (kept - 1) * vectors * vector, moved, B * kept * D * (2 * residual + 9 * norm)
    moved, again = index, 0
    if residual:
        moved += 2 * rows + stream + vector  # dy, branch, gate -> dbranch
        again += (kept - 1) * vector
    if norm:
        moved += rows + stream + statistics + vector  # du, y, mean, rstd, scale
        again += (2 * kept - 1) * vector
    if norm or K:
        moved += B * N * D * x.itemsize  # -> dx
    if K:
        again += (groups * (config["ROWS"] // config["TILE"]) - 1) * index
    # The least that this launch could write is the sums themselves, in float32, instead of partial sums.
    return moved + parts, again, moved + 4 * vectors * B * D, B * kept * D * (3 * residual + 16 * norm)
