"""Compile kernels ahead of time, on a machine without a GPU, and read registers, memory and instructions of the result.

The `cases.py` of each operation's folder has `aot_cases()`, which yields one `Case` per launch and configuration. A
case describes how the launch is made (arguments, grid, configuration) and how many bytes and FLOPs follow from its
geometry. `build` compiles a case for a target with the argument specialization that the JIT would apply, and returns a
`Build`.
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
        launch: a name for this launch, such as "hidden". The costs of all launches with the same (operation, direction,
            shape, config) are added up.
        shape: the shape and dtypes, such as "B32 N256 K128 C768 bf16/int8".
        config: the configuration, such as "default" or "ROWS=8 BLOCK_C=256 warps=4".
        kernel: the triton.jit function.
        arguments: dict from argument name, in the kernel's order, to a pointer type ("*bf16"), an int, a float or None,
            without the constexprs. Ints are specialized as by the JIT: 1 becomes a constant, multiples of 16 are
            marked. Pointers are assumed to be 16-byte aligned, as PyTorch's allocator returns them.
        constexprs: dict from constexpr name to value.
        num_warps, num_stages: compile options.
        waves, hip_stages: num_warps and num_stages on gfx942, where a warp has 64 lanes and shared memory is 64 KiB; 0
            means the same as num_warps or num_stages.
        grid: the launch grid.
        moved: bytes that the programs of the launch load and store, including repeated reads (masked-off lanes move
            nothing).
        cached: bytes that programs load again from L2. They are not part of `moved` where cases.py of the operation
            states the reason.
        warm: bytes of `moved` that the previous launch has left in L2, so they are not read from DRAM.
        hip_constexprs: constexprs that differ on gfx942.
        least: the least bytes that this launch can move: each of its inputs and each of its outputs once.
        flops: floating-point operations of the launch.
        rows: arguments through which token rows are read or written; each of these accesses must be at least 16 bytes
            wide.
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
    waves: int = 0
    hip_stages: int = 0
    cached: int = 0
    warm: int = 0
    hip_constexprs: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Build:
    """The compiled code of a case for one target: registers, memory, occupancy and instructions."""

    target: str
    registers: int  # per thread (VGPRs and AGPRs on gfx942)
    scalar_registers: int  # gfx942 only, else 0
    stack: int  # bytes per thread
    spills: int  # spill loads and stores (bytes on NVIDIA, registers on gfx942)
    shared: int  # bytes per block
    occupancy: float  # resident warps over the maximum of a multiprocessor (compute unit), computed from its limits
    widest_load: int  # bytes
    widest_store: int
    narrowest_row: int  # bytes: the narrowest access through one of case.rows
    tensor_core: str  # "mma.sync", "wgmma", "tcgen05", "mfma" or ""
    access: tuple  # ((argument name, "load" or "store", bytes), ...)


def specialize(case):
    """The signature, constants and attributes that `triton.jit` would derive from real arguments of a case."""
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
    signature, constants, attributes = specialize(case)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if TARGETS[target].backend == "hip":
        options = {"num_warps": case.waves or case.num_warps, "num_stages": case.hip_stages or case.num_stages}
        constants |= case.hip_constexprs
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


_built = {}


def build(case, target):
    """Compile a case and return its `Build`; the same source is compiled once per process (and cached by Triton)."""
    key = (
        case.kernel.__name__,
        str(specialize(case)),
        case.num_warps,
        case.waves,
        case.num_stages,
        case.hip_stages,
        target,
        case.rows,
    )
    if key not in _built:
        _built[key] = _inspect(case, target, compile_case(case, target))
    return _built[key]


# ---- Reading the compiled code -----------------------------------------------------------------------------


def _inspect(case, target, compiled):
    amd = TARGETS[target].backend == "hip"
    assembly = compiled.asm["amdgcn" if amd else "ptx"]
    usage = _amd_usage(assembly) if amd else _nvidia_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    threads = (case.waves or case.num_warps) * 64 if amd else case.num_warps * 32
    access = tuple(sorted(accesses(compiled.asm["llir"], _pointer_names(case))))
    rows = [size for name, _, size in access if name in case.rows]
    loads, stores = _widths(assembly, amd)
    return Build(
        target=target,
        **usage,
        shared=shared,
        occupancy=occupancy(target, threads, usage["registers"], shared),
        widest_load=max(loads, default=0),
        widest_store=max(stores, default=0),
        narrowest_row=min(rows, default=0),
        tensor_core=_tensor_core(assembly),
        access=access,
    )


@functools.cache
def _tool(name):
    """A CUDA binary tool from Triton's own package."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: this Triton package has no {name}")
    return path


def _nvidia_usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True)
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.stdout)}
        spills = 0
        if found["STACK"] or found.get("LOCAL"):
            # Spilled registers are kept in local memory (the stack): count the accesses to it in the SASS.
            sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
            spills = len(re.findall(r"\b(?:STL|LDL)\b", sass.stdout))
    stack = found["STACK"] + found.get("LOCAL", 0)
    return {"registers": found["REG"], "scalar_registers": 0, "stack": stack, "spills": spills}


def _amd_usage(assembly):
    found = {key: int(value) for key, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    return {
        # On gfx942, vgpr_count includes the accumulation registers: both kinds share one register file.
        "registers": max(found["vgpr_count"], found.get("agpr_count", 0)),
        "scalar_registers": found["sgpr_count"],
        "stack": found["private_segment_fixed_size"],
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
    }


def occupancy(target, threads, registers, shared):
    """The share of a multiprocessor's warps (a compute unit's waves) that can be resident, from the published limits.

    Args:
        target: a key of TARGETS.
        threads: threads per block.
        registers: registers per thread.
        shared: bytes of shared memory per block.
    """
    if TARGETS[target].backend == "hip":
        waves = threads // 64
        per_simd = min(8, 512 // max(8, -(-registers // 8) * 8))  # Four SIMDs of 512 registers and 8 waves each.
        blocks = min(4 * per_simd // waves, 65536 // shared if shared else 32)
        return blocks * waves / 32
    memory = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[target] * 1024
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256  # Registers are allocated to a warp in units of 256.
    blocks = min(64 // warps, 32, 65536 // per_warp // warps, memory // (shared + 1024))
    return blocks * warps / 64


def _widths(assembly, amd):
    """Bytes per lane of every global load and store in the assembly."""
    if amd:
        size = {"ubyte": 1, "sbyte": 1, "byte": 1, "ushort": 2, "sshort": 2, "short": 2, "dword": 4}
        size |= {"dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        found = re.findall(r"\b(?:global|buffer|flat)_(load|store)_(?:lds_)?([a-z]+?(?:x\d)?)\b", assembly)
        pairs = [(kind, size[unit]) for kind, unit in found if unit in size]
    else:
        found = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+)\b", assembly)
        pairs = [("load" if kind == "ld" else "store", int(n or 1) * int(bits) // 8) for kind, n, bits in found]
        pairs += [
            ("load", int(n, 0))
            for n in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* .*?, (0x\w+|\d+)[,;]", assembly)
        ]
    return [n for kind, n in pairs if kind == "load"], [n for kind, n in pairs if kind == "store"]


def _tensor_core(assembly):
    for name, pattern in {
        "tcgen05": r"tcgen05\.mma",
        "wgmma": r"wgmma\.mma_async",
        "mma.sync": r"mma\.sync",
        "mfma": r"v_mfma_",
    }.items():
        if re.search(pattern, assembly):
            return name
    return ""


def _pointer_names(case):
    """The argument names in the order of the compiled kernel's parameters, without constants, which are not passed."""
    signature, _, _ = specialize(case)
    return [name for name in case.kernel.arg_names if signature[name] != "constexpr"]


_BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64, "ptr": 64}


def _bytes(type_name):
    """Size of an LLVM scalar or vector type such as '<8 x i16>'."""
    count, element = re.fullmatch(r"(?:<(\d+) x )?([a-z0-9]+)>?", type_name.strip()).groups()
    bits = int(element[1:]) if re.fullmatch(r"i\d+", element) else _BITS[element]
    return int(count or 1) * bits // 8


_ACCESSES = [
    # (pattern, kind, how to get the bytes from the match)
    (
        re.compile(r'asm sideeffect ".*?ld\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+) '),
        "load",
        lambda m: int(m[1] or 1) * int(m[2]) // 8,
    ),
    (
        re.compile(r'asm sideeffect ".*?st\.global[.\w:]*?(?:\.v(\d))?\.[a-z](\d+) '),
        "store",
        lambda m: int(m[1] or 1) * int(m[2]) // 8,
    ),
    (re.compile(r"cp\.async\.c[ag]\.shared\.global.*?\], (0x\w+|\d+)"), "load", lambda m: int(m[1], 0)),
    (re.compile(r"nvvm\.cp\.async\.c[ag]\.shared\.global\.(\d+)"), "load", lambda m: int(m[1])),
    (
        re.compile(r"= (?:tail )?load (?:volatile )?(<[^>]*>|\w+), ptr addrspace\(1\)"),
        "load",
        lambda m: _bytes(m[1]),
    ),
    (
        re.compile(r"store (?:volatile )?(<[^>]*>|\w+) .*?, ptr addrspace\(1\)"),
        "store",
        lambda m: _bytes(m[1]),
    ),
    (
        re.compile(r"call (<[^>]*>|\w+) @llvm\.amdgcn\.raw\.ptr\.buffer\.load\."),
        "load",
        lambda m: _bytes(m[1]),
    ),
    (
        re.compile(r"@llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\((<[^>]*>|\w+) "),
        "store",
        lambda m: _bytes(m[1]),
    ),
    (
        re.compile(
            r"@llvm\.amdgcn\.(?:raw\.ptr\.buffer|global)\.load\.(?:async\.)?(?:to\.)?lds"
            r".*?ptr addrspace\(3\) [^,]*, i32 (\d+)"
        ),
        "load",
        lambda m: int(m[1]),
    ),
]


def accesses(llir, names):
    """The set of (argument, "load" or "store", bytes per lane) of a kernel's LLVM IR.

    For every SSA value, this tracks the set of pointer arguments that it was computed from. The set of a loaded value
    is empty.

    Args:
        llir: text of the LLVM IR.
        names: argument names in the order of the kernel's parameters.
    """
    body = llir[re.search(r"^define .*?_kernel void", llir, re.MULTILINE).start() :].splitlines()
    origin = {f"%{i}": {name} for i, name in enumerate(names)}
    found = set()
    for _ in range(3):  # A phi may refer to values that are defined below it: repeat for loops.
        for line in body[1:]:
            code = line.split(", !dbg")[0]
            match = re.match(r"\s+(%[\w.]+) = ", code)
            hit = next(((kind, size(m)) for pattern, kind, size in _ACCESSES if (m := pattern.search(code))), None)
            operands = re.findall(r"%[\w.]+", code[match.end() :] if match else code)
            if hit:
                found |= {(name, *hit) for operand in operands for name in origin.get(operand, ())}
            elif match and not re.search(r"= (?:tail )?load ", code):
                origin[match[1]] = set().union(*(origin.get(operand, ()) for operand in operands))
    return {(name, kind, size) for name, kind, size in found}
