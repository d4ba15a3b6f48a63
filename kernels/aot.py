"""Build kernels ahead of time for GPUs that are not here, and read off what the compiler made of them.

Each operation's folder has `cases.py` with `aot_cases()`, which yields one `Case` per
launch and configuration worth looking at. A case says how the launch is made (arguments, grid, configuration)
and how many bytes and FLOPs it costs by its geometry; `build` compiles it for a target with the argument
specialization that the JIT would apply, and returns a `Build`.
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
        launch: a name for this launch, such as "hidden"; launches of one (operation, direction, shape,
            config) add up.
        shape: the shape and dtypes, such as "B32 N256 K128 C768 bf16/int8".
        config: the configuration, such as "default" or "ROWS=8 BLOCK_C=256 warps=4".
        kernel: the triton.jit function.
        arguments: dict from argument name, in the kernel's order, to a pointer type ("*bf16"), an int, a
            float or None; constexprs are left out. Ints are specialized as the JIT does it: 1 becomes a
            constant, multiples of 16 are marked. Pointers are taken as 16-byte aligned, which PyTorch's
            allocator gives.
        constexprs: dict from constexpr name to value.
        num_warps, num_stages: compile options.
        waves, hip_stages: num_warps and num_stages on gfx942, where a warp has 64 lanes and shared memory 64 KiB; 0
            stands for num_warps, num_stages.
        grid: the launch grid.
        moved: bytes that the launch's programs load and store, re-reads included (masked-off lanes move
            nothing).
        cached: bytes that programs load again and L2 has; left out of `moved` where the operation's file says why.
        warm: bytes of `moved` that the launch before has left in L2, so that DRAM need not give them again.
        hip_constexprs: constexprs that differ on gfx942.
        least: bytes that this launch cannot do without: each of its inputs once, each of its outputs once.
        flops: floating-point operations of the launch.
        rows: arguments through which token rows are read or written; none of these accesses may be under 16
            bytes.
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


def specialize(case):
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
    signature, constants, attributes = specialize(case)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    if TARGETS[target].backend == "hip":
        options = {"num_warps": case.waves or case.num_warps, "num_stages": case.hip_stages or case.num_stages}
        constants |= case.hip_constexprs
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=TARGETS[target], options=options)


_built = {}


def build(case, target):
    """Compile a case and read off its `Build`; the same source is compiled once per process (and cached by
    Triton).
    """
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


# ---- Reading what the compiler made ------------------------------------------------------------------------


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
            # Spills live in local memory, so there are none without a stack; with one, count its accesses in
            # the SASS.
            sass = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True)
            spills = len(re.findall(r"\b(?:STL|LDL)\b", sass.stdout))
    stack = found["STACK"] + found.get("LOCAL", 0)
    return {"registers": found["REG"], "scalar_registers": 0, "stack": stack, "spills": spills}


def _amd_usage(assembly):
    found = {key: int(value) for key, value in re.findall(r"^\s*-?\s*\.(\w+):\s+(\d+)\s*$", assembly, re.MULTILINE)}
    return {
        # gfx942 counts the accumulation registers inside vgpr_count: the two share one file.
        "registers": max(found["vgpr_count"], found.get("agpr_count", 0)),
        "scalar_registers": found["sgpr_count"],
        "stack": found["private_segment_fixed_size"],
        "spills": found["vgpr_spill_count"] + found["sgpr_spill_count"],
    }


def occupancy(target, threads, registers, shared):
    """Share of a multiprocessor's warps (a compute unit's waves) that can be resident, from the published
    limits.
    """
    if TARGETS[target].backend == "hip":
        waves = threads // 64
        per_simd = min(8, 512 // max(8, -(-registers // 8) * 8))  # Four SIMDs of 512 registers and 8 waves each.
        blocks = min(4 * per_simd // waves, 65536 // shared if shared else 32)
        return blocks * waves / 32
    memory = {"sm_80": 164, "sm_90": 228, "sm_100": 228}[target] * 1024
    warps = threads // 32
    per_warp = -(-registers * 32 // 256) * 256  # Registers are handed out to a warp in units of 256.
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
    """Argument names in the order of the compiled kernel's parameters (constants are not passed)."""
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

    Every SSA value carries the set of pointer arguments that it was computed from; what was loaded carries
    none.
    """
    body = llir[re.search(r"^define .*?_kernel void", llir, re.MULTILINE).start() :].splitlines()
    origin = {f"%{i}": {name} for i, name in enumerate(names)}
    found = set()
    for _ in range(3):  # A phi may name values further down: repeat until loops have settled.
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
