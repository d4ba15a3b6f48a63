"""Build kernels ahead of time for GPUs that are not here, and read off what the compiler made of them.

Each operation's file has `aot_cases()`, which yields one `Case` per launch and configuration worth looking at. A case says
how the launch is made (arguments, grid, configuration) and how many bytes and FLOPs it costs by its geometry;
`build` compiles it for a target with the argument specialisation that the JIT would apply, and returns a `Build`.
"""

import dataclasses
import functools
import os
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One launch of one kernel in one configuration.

    Attributes:
        operation: the public function, such as "mix_and_drop".
        direction: "forward" or "backward".
        launch: a name for this launch, such as "hidden"; launches of one (operation, direction, shape, config) add up.
        shape: the shape and dtypes, such as "B32 N256 K128 C768 bf16/int8".
        config: the configuration, such as "default" or "ROWS=8 BLOCK_C=256 warps=4".
        kernel: the triton.jit function.
        arguments: dict from argument name, in the kernel's order, to a pointer type ("*bf16"), an int, a float or
            None; constexprs are left out. Ints are specialised as the JIT does it: 1 becomes a constant, multiples of 16
            are marked. Pointers are taken as 16-byte aligned, which PyTorch's allocator gives.
        constexprs: dict from constexpr name to value.
        num_warps, num_stages: compile options.
        grid: the launch grid.
        moved: bytes that the launch's programs load and store, re-reads included (masked-off lanes move nothing).
        least: bytes that this launch cannot do without: each of its inputs once, each of its outputs once.
        flops: floating-point operations of the launch.
        rows: arguments through which token rows are read or written; none of these accesses may be under 16 bytes.
    """

    operation: str
    direction: str
    launch: str
    shape: str
    config: str
    kernel: object
    arguments: dict
    constexprs: dict
    num_warps: int
    num_stages: int
    grid: tuple
    moved: int
    least: int
    flops: int
    rows: tuple = ()

    @property
    def threads(self):
        return self.num_warps * 32


@dataclasses.dataclass(frozen=True)
class Build:
    """What the compiler made of a case for one target."""

    target: str
    registers: int  # per thread (VGPRs and AGPRs on gfx942)
    scalar_registers: int  # gfx942 only, else 0
    stack: int  # bytes per thread
    spills: int  # spill loads and stores (bytes on NVIDIA, registers on gfx942)
    shared: int  # bytes per block
    occupancy: float  # resident warps over the most that a multiprocessor (compute unit) holds, by rule
    widest_load: int  # bytes
    widest_store: int
    narrowest_row: int  # bytes: the narrowest access through one of case.rows
    tensor_core: str  # "mma.sync", "wgmma", "tcgen05", "mfma" or ""
    access: tuple  # ((argument name, "load" or "store", bytes), ...)


def specialise(case):
    """Signature, constants and attributes of a case, as `triton.jit` derives them from real arguments."""
    names = case.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(names):
        value = case.arguments.get(name, case.constexprs.get(name))
        if name not in case.arguments and name not in case.constexprs:
            raise KeyError(f"{case.kernel.__name__}: {case.launch}: argument {name} is missing")
        if name in case.constexprs or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, str):
            signature[name] = value
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_case(case, target):
    """The triton.compile result of a case for one of TARGETS."""
    signature, constants, attributes = specialise(case)
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if TARGETS[target].backend == "hip":
        options["num_warps"] = max(1, case.num_warps // 2)  # A wave has 64 lanes: the same threads in half the warps.
    return triton.compile(source, target=TARGETS[target], options=options)


_built = {}


def build(case, target):
    """Compile a case and read off its `Build`; the same source is compiled once per process (and cached by Triton)."""
    key = (case.kernel.__name__, str(specialise(case)), case.num_warps, case.num_stages, target)
    if key not in _built:
        _built[key] = _inspect(case, target, compile_case(case, target))
    return _built[key]
