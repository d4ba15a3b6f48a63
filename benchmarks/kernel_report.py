"""Compile every kernel for several GPUs, without having one, and count the bytes and FLOPs of each launch.

    python -m benchmarks.kernel_report [--out DIR] [--targets sm_80 sm_90 sm_100 gfx942] [--defaults-only]

This prints two tables and writes them as CSV, with a summary (`kernels.md`). `kernels-builds.csv` has one row per
launch, configuration and target: registers, stack, spills, shared memory, occupancy from the published limits, widest
load and store, the narrowest access to a token row, and the tensor-core instruction. `kernels-operations.csv` has one
row per operation, direction and shape, for the default configurations: the bytes that the launches move according to
their geometry, relative to the least possible and to the unfused operations of PyTorch (counted one by one), the FLOPs,
and lower bounds of the time on several devices, from their bandwidth and peak. Nothing here is measured on a GPU.
"""

import argparse
import collections
import csv
import functools
import math
import pathlib
import sys
import time

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.report import markdown_table
from maskalign.runtime.accelerators import PEAK_TFLOPS
from maskalign_kernels import aot
from maskalign_kernels.adaln import cases as adaln_cases
from maskalign_kernels.mix_and_drop import cases as mix_cases
from maskalign_kernels.mix_and_drop import naive as mix_naive
from maskalign_kernels.subset_cosine_alignment import cases as alignment_cases
from maskalign_kernels.subset_cosine_alignment import naive as alignment_naive

CASES = {
    "subset_cosine_alignment": alignment_cases, "mix_and_drop": mix_cases,
    **adaln_cases.OPERATIONS,
}  # fmt: skip

# Published GB/s of memory and TFLOP/s of float32 vectors.
MEMORY_AND_VECTORS = {
    "A100": (2039, 19.5), "H100": (3350, 67), "H200": (4800, 67), "B200": (8000, 75), "MI300X": (5300, 163),
}  # fmt: skip
# GB/s, then dense TFLOP/s of bfloat16 and float16, of TF32 (float32 on MI300X), of float32 vectors.
DEVICES = {name: (memory, *PEAK_TFLOPS[name], vectors) for name, (memory, vectors) in MEMORY_AND_VECTORS.items()}


class BytesMoved(TorchDispatchMode):
    """Add up the bytes that eager PyTorch operations read and write: the inputs and outputs of each operation, once.

    Views cost nothing, broadcast dimensions are counted once, and a gather reads only the rows that it returns.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.is_view or function.name().startswith(("aten::detach", "aten::empty", "aten::_unsafe_view")):
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        if function.name().startswith(("aten::gather", "aten::index")):
            inputs = [*outputs, *inputs[1:]]
        self.total += sum(map(_footprint, inputs)) + sum(map(_footprint, outputs))
        return out


def _footprint(tensor):
    size = tensor.itemsize
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= 1 if stride == 0 else length
    return size


# The unfused formulas, as other training codes write them.
unfused_alignment, unfused_mix = alignment_naive.subset_cosine_alignment, mix_naive.mix_and_drop


def _gather(rows, subset):
    return rows.gather(1, subset.unsqueeze(-1).expand(-1, -1, rows.shape[-1]))


def unfused_modulate(x, shift, scale, subset=None):
    """adaln_modulate as separate operations: gather, normalize, multiply, add."""
    rows = x if subset is None else _gather(x, subset)
    return F.layer_norm(rows, (rows.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def unfused_residual(x, branch, gate, subset=None):
    """gated_residual as separate operations: gather, multiply, add."""
    return (x if subset is None else _gather(x, subset)) + gate.unsqueeze(1) * branch


def unfused_residual_modulate(x, branch, gate, shift, scale, subset=None):
    """gated_residual_adaln as separate operations."""
    y = unfused_residual(x, branch, gate, subset)
    return y, unfused_modulate(y, shift, scale)


# The unfused function of each adaLN operation, and its numbers of branch and vector arguments.
UNFUSED_ADALN = {
    "adaln_modulate": (unfused_modulate, 0, 2),
    "gated_residual": (unfused_residual, 1, 1),
    "gated_residual_adaln": (unfused_residual_modulate, 1, 3),
}


def outputs(result):
    """The result of an operation as a tuple."""
    return result if isinstance(result, tuple) else (result,)


def unfused_bytes(operation, shape, gathered=False):
    """(forward, backward) bytes of the unfused operations on one of the operation's SHAPES."""
    empty = lambda *size, dtype, grad=False: torch.empty(size, dtype=dtype, device="meta", requires_grad=grad)  # noqa: E731
    if operation in UNFUSED_ADALN:
        images, tokens, kept, width, x, branch = shape
        function, branches, vectors = UNFUSED_ADALN[operation]
        arguments = [empty(images, tokens, width, dtype=x, grad=True)]
        arguments += [empty(images, kept or tokens, width, dtype=branch, grad=True) for _ in range(branches)]
        arguments += [empty(images, width, dtype=branch, grad=True) for _ in range(vectors)]
        arguments.append(None if kept is None else empty(images, kept, dtype=torch.int64))
    elif operation == "mix_and_drop":
        images, tokens, kept, width, hidden, x, _, product = shape
        # Weights and tokens have one dtype: casts are not counted, which favors the unfused operations.
        dtype = torch.promote_types(x, product) if x == torch.float32 else product
        vectors = [empty(images, width, dtype=dtype, grad=True) for _ in range(3)]
        sizes = [(hidden, tokens), (hidden,), (tokens, hidden), (tokens,)]
        weights = [empty(*size, dtype=dtype, grad=True) for size in sizes]
        subset = None if kept is None else empty(images, kept, dtype=torch.int64)
        arguments = (empty(images, tokens, width, dtype=dtype, grad=True), *vectors, *weights, subset)
        function = unfused_mix
    else:
        images, tokens, kept, width, student, teacher = shape
        s = empty(images, tokens if gathered else kept, width, dtype=student, grad=True)
        z, subset = empty(images, tokens, width, dtype=teacher), empty(images, kept, dtype=torch.int64)
        arguments = (s, z, subset)
        function = functools.partial(unfused_alignment, student_is_subset=not gathered)
    with BytesMoved() as forward:
        out = function(*arguments)
    outs = outputs(out)
    with BytesMoved() as backward:
        torch.autograd.backward(outs, [torch.empty_like(o) for o in outs])
    return forward.total, backward.total


def least_bytes(operation, direction, shape, gathered=False):
    """The least bytes that the whole operation can move: each argument that it needs and each result, once."""
    if operation in UNFUSED_ADALN:
        images, tokens, kept, width, x, branch = shape
        stream, row = (images * (kept or tokens) * width * dtype.itemsize for dtype in (x, branch))
        dx = images * tokens * width * x.itemsize
        return {
            "adaln_modulate": (stream + row, row + stream + dx),  # x -> u; du, x -> dx
            # x, branch -> y; dy, branch -> dbranch, and dx only where rows are missing from dy
            "gated_residual": (2 * stream + row, stream + 2 * row + (dx if kept else 0)),
            # x, branch -> y, u; dy, du, y, branch -> dx, dbranch
            "gated_residual_adaln": (2 * stream + 2 * row, 2 * stream + 3 * row + dx),
        }[operation][direction == "backward"]
    if operation == "mix_and_drop":
        images, tokens, kept, width, _, x, _, _ = shape
        rows = images * tokens * width * x.itemsize
        out = images * (tokens if kept is None else kept) * width * x.itemsize
        return rows + out if direction == "forward" else 2 * rows + out
    images, tokens, kept, width, student, teacher = shape
    rows = images * kept * width * (student.itemsize + teacher.itemsize)
    scalars = images * kept * (8 + 4)
    if direction == "forward":
        return rows + scalars
    return rows + scalars + images * (tokens if gathered else kept) * width * student.itemsize


def floors(moved, flops, kind):
    """Lower bounds of the time: {device: (microseconds by bandwidth, microseconds by peak)}.

    Args:
        moved: bytes.
        flops: floating-point operations.
        kind: which peak applies: 'bf16', 'fp16' or 'fp32' of matrix products, or 'vector'.
    """
    column = {"bf16": 1, "fp16": 1, "fp32": 2, "vector": 3}[kind]
    times = {}
    for name, figures in DEVICES.items():
        products = 3 if kind == "fp32" and name != "MI300X" else 1  # NVIDIA computes float32 as three TF32 products.
        times[name] = moved / figures[0] / 1e3, flops * products / figures[column] / 1e6
    return times


def operations():
    """One dict per operation, direction and shape, for the default configuration.

    `over_least` counts all inputs of every launch. `over_least_l2` does not count those that are still in L2 from the
    previous launch.
    """
    rows = []
    for operation, module in CASES.items():
        for shape in module.SHAPES:
            sums = collections.defaultdict(collections.Counter)
            for case in module.aot_cases([shape], every_configuration=False):
                entry = sums[case.operation, case.direction, case.launch.startswith("gathered"), case.shape]
                entry.update(launches=1, moved=case.moved, warm=case.warm, launch_least=case.least, flops=case.flops)
            for (name, direction, gathered, label), entry in sums.items():
                least = least_bytes(operation, direction, shape, gathered)
                unfused = unfused_bytes(operation, shape, gathered)[direction == "backward"]
                kind = label.rsplit("/", 1)[-1] if operation == "mix_and_drop" else "vector"
                row = {
                    "operation": name, "direction": direction, "student": "gathered" if gathered else "",
                    "shape": label, "launches": entry["launches"], "bytes": entry["moved"],
                    "over_launch_least": entry["moved"] / entry["launch_least"], "over_least": entry["moved"] / least,
                    "over_least_l2": (entry["moved"] - entry["warm"]) / least, "unfused_bytes": unfused,
                    "of_unfused": entry["moved"] / unfused, "flops": entry["flops"],
                }  # fmt: skip
                for device, (bandwidth, peak) in floors(entry["moved"], entry["flops"], kind).items():
                    row |= {f"{device}_bandwidth_us": bandwidth, f"{device}_peak_us": peak}
                rows.append(row)
    return rows


def builds(cases, targets, progress=lambda done, total: None):
    """Compile every case for every target, and return one dict for each."""
    rows, pairs = [], [(case, target) for case in cases for target in targets]
    for number, (case, target) in enumerate(pairs):
        progress(number, len(pairs))
        build = aot.build(case, target)
        named = ("operation", "direction", "launch", "shape", "config")
        made = ("target", "registers", "scalar_registers", "stack", "spills", "shared", "occupancy")
        rows.append(
            {name: getattr(case, name) for name in named}
            | {name: getattr(build, name) for name in (*made, "widest_load", "widest_store")}
            | {"narrowest_row_access": build.narrowest_row, "tensor_core": build.tensor_core}
            | {"programs": math.prod(case.grid), "bytes": case.moved, "over_least": case.moved / case.least}
            | {"flops": case.flops}
        )
    return rows


def faults(row):
    """The list of faults of a row of `builds` by the rules of this project, empty if there is none."""
    found = []
    if row["spills"]:
        found.append(f"{row['spills']} spills")
    if row["stack"]:
        found.append(f"{row['stack']} bytes of stack")
    if not row["occupancy"]:
        found.append(f"{row['shared']} bytes of shared memory and {row['registers']} registers do not fit a processor")
    if 0 < row["narrowest_row_access"] < 16:
        found.append(f"a token row accessed {row['narrowest_row_access']} bytes at a time")
    if row["over_least"] > 1.15:
        found.append(f"moves {row['over_least']:.2f}x the least bytes of the launch")
    return found


def _table(rows, columns):
    text = [[cell(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in text)) for i, c in enumerate(columns)]
    for line in [columns, *text]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# XL/2 with DINOv2-B's features as int8; the mixer with a half and with a quarter of the tokens;
# the adaLN operations at XL/2 with a class token: all rows, and three quarters of the patches.
SUMMARY = (
    "B32 N256 K128 C768 bf16/int8", *(f"B32 N256 K{k} D1152 T64 bf16/bf16/bf16" for k in (128, 64)),
    *(f"B32 N257 K{k} D1152 bf16/bf16" for k in (None, 193)),
)  # fmt: skip


def summary(counted, built):
    """A few rows of both tables as Markdown, for `kernels.md`."""
    clean = sum(not faults(row) for row in built)
    targets = ", ".join(dict.fromkeys(row["target"] for row in built))
    which = "the default configurations" if all(r["config"] == "default" for r in built) else "every configuration"
    registers = [row["registers"] for row in built if row["target"] != "gfx942"]
    head = ["launches", "shape", "bytes moved", "over the least", "of the unfused", "GFLOP", *DEVICES]
    lines = []
    for row in counted:
        if row["shape"] not in SUMMARY or row["student"]:
            continue
        over = f"{row['over_least']:.2f}x"
        if row["over_least_l2"] < row["over_least"]:
            over += f" ({row['over_least_l2']:.2f}x from DRAM)"
        floors = [max(row[f"{device}_bandwidth_us"], row[f"{device}_peak_us"]) for device in DEVICES]
        lines.append([
            f"{row['operation']}, {row['direction']}", row["shape"], f"{row['bytes'] / 1e6:.1f} MB", over,
            f"1/{1 / row['of_unfused']:.1f}", f"{row['flops'] / 1e9:.2f}", *(f"{floor:.1f} us" for floor in floors),
        ])  # fmt: skip
    return "\n".join([
        f"{clean} of {len(built)} builds ({targets}; every launch and shape, {which}) have no spill, no stack, 16-byte "
        f"row accesses and at most 1.15x the bytes of their launch; {min(registers)} to {max(registers)} registers on "
        f"NVIDIA. The times are floors, by published bandwidth and peak. Not measured on a GPU.",
        "",
        markdown_table(head, lines),
        "",
    ])  # fmt: skip


def _write(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _progress():
    start = time.time()

    def progress(done, total):
        if sys.stderr.isatty() or done % 100 == 0:
            print(f"\r{done}/{total} builds, {time.time() - start:.0f} s", end="", file=sys.stderr, flush=True)

    return progress


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/kernel_report", help="folder for the CSVs and kernels.md")
    parser.add_argument("--targets", nargs="+", default=list(aot.TARGETS), choices=list(aot.TARGETS))
    parser.add_argument("--operations", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--defaults-only", action="store_true", help="only the default configurations")
    options = parser.parse_args()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)

    cases = [c for name in options.operations for c in CASES[name].aot_cases(None, not options.defaults_only)]
    built = builds(cases, options.targets, _progress())
    print(file=sys.stderr)
    _write(out / "kernels-builds.csv", built)
    _table(built, [c for c in built[0] if c not in ("scalar_registers", "programs", "bytes", "flops")])
    print()
    counted = operations()
    _write(out / "kernels-operations.csv", counted)
    _table(counted, [c for c in counted[0] if c not in ("launches", "unfused_bytes")])
    text = summary(counted, built)
    (out / "kernels.md").write_text(text)
    print("\n" + text)
    bad = [(row, faults(row)) for row in built if faults(row)]
    for row, found in bad:
        print("FAULT", *list(row.values())[:6], "; ".join(found))
    print(f"\n{len(built)} builds, {len(bad)} with a fault. Not measured on a GPU. Written to {out}/")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
