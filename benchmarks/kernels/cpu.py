"""Time of both operations on the CPU, where the public functions run their cpu.py: `--device cpu`.

    python -m benchmarks.kernels --device cpu [--threads 1 --clock cpu] [--rounds 25] [--operations ...] [--out DIR]

A pass is a forward followed by its backward, as in training. Both times are from the same pass, and `both` is their
sum. All providers are first checked against the chain in float64; a provider with a wrong result is reported and not
timed. They then take turns in rounds, in another order every round. Times are medians over rounds with the 20th and
80th percentile. `x_kernel` is the median of a provider's time divided by the kernel's time in the same round; above 1
our CPU path is faster. Rows are written to kernels-cpu.csv, a figure to kernels-cpu.png. Without a C++ compiler
`compiled` is not measured. The adaLN operations are not measured, because on a CPU they run the plain PyTorch lines.
"""

import csv
import gc
import pathlib
import random
import statistics
import sys

import torch

from benchmarks.kernel_report import cell
from benchmarks.kernels.cases import DIRECTIONS, PROVIDERS, SETUPS, label, precision, relative_error, tolerated_error
from benchmarks.steps.clock import CLOCKS, matmul_peak
from benchmarks.steps.command import can_compile
from benchmarks.steps.report import machine
from maskalign.runtime.device import tune_host

F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
# Sizes of training on a CPU: 256 tokens, a half and a quarter of them kept, batch 8. The alignment's sizes are those of
# any preset with DINOv2-B's features. The mixer's are those of SiT-S/2 and SiT-B/2, whose tokens and weights have the
# same dtype on a CPU.
SHAPES = {
    "subset_cosine_alignment": [
        (8, 256, kept, 768, student, teacher)
        for student in (BF16, F32) for teacher in (INT8, F16) for kept in (128, 64)
    ] + [(8, 256, 128, 768, BF16, BF16)],
    "mix_and_drop": [
        (8, 256, kept, width, 64, dtype, dtype, dtype)
        for width in (384, 768) for dtype in (BF16, F32) for kept in (128, 64)
    ],
}  # fmt: skip
COLUMNS = [
    "operation", "shape", "direction", "provider", "ms", "ms_20", "ms_80", "x_kernel", "x_kernel_20", "x_kernel_80",
    "error", "rounds", "clock", "machine",
]  # fmt: skip
WARMUP = 3


def one_pass(function, arguments, leaves, gradient, now):
    """Seconds of one forward and of its backward."""
    start = now()
    out = function(*arguments)
    middle = now()
    grads = torch.autograd.grad(out, leaves, gradient)
    end = now()
    del grads  # Freed after the clock has stopped.
    return middle - start, end - middle


def take_turns(functions, arguments, leaves, rounds, clock):
    """{provider: {direction: seconds of every round}}."""
    now, order, shuffle = CLOCKS[clock], list(functions), random.Random(0)
    gradient = torch.randn_like(functions[order[0]](*arguments))
    seconds = {provider: {direction: [] for direction in DIRECTIONS} for provider in order}
    for number in range(-WARMUP, rounds):
        shuffle.shuffle(order)
        gc.collect()
        for provider in order:
            forward, backward = one_pass(functions[provider], arguments, leaves, gradient, now)
            if number >= 0:
                for direction, taken in zip(DIRECTIONS, (forward, backward, forward + backward), strict=True):
                    seconds[provider][direction].append(taken)
    return seconds


def spread(values):
    """Median, 20th and 80th percentile."""
    ordered = sorted(values)
    return statistics.median(ordered), *(ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.8))


def rows_of(seconds):
    """One dict of times and ratios per provider and direction, from the result of `take_turns`."""
    rows = []
    for provider, of in seconds.items():
        for direction, taken in of.items():
            row = {"provider": provider, "direction": direction}
            row |= zip(("ms", "ms_20", "ms_80"), (1000 * value for value in spread(taken)), strict=True)
            if "kernel" in seconds:
                ratios = [a / b for a, b in zip(taken, seconds["kernel"][direction], strict=True)]
                row |= zip(("x_kernel", "x_kernel_20", "x_kernel_80"), spread(ratios), strict=True)
            rows.append(row)
    return rows


def measure(operation, shape, rounds, clock, without=()):
    """Rows (dicts with COLUMNS except the machine) of one shape; rows of a wrong result have no times."""
    arguments, leaves, functions = SETUPS[operation](shape, torch.device("cpu"))
    exact = functions["eager"]
    functions = {name: function for name, function in functions.items() if name not in without}
    errors = {name: relative_error(function, exact, arguments, leaves) for name, function in functions.items()}
    right = {name: f for name, f in functions.items() if errors[name] < tolerated_error(shape, leaves)}
    found = [{"provider": name, "direction": "wrong result, not timed"} for name in functions if name not in right]
    found += rows_of(take_turns(right, arguments, leaves, rounds, clock)) if right else []
    common = {"operation": operation, "shape": label(operation, shape), "rounds": rounds, "clock": clock}
    return [{**dict.fromkeys(COLUMNS, ""), **common, **row, "error": errors[row["provider"]]} for row in found]


def table(rows):
    """The rows as aligned text."""
    columns = [c for c in COLUMNS if c not in ("rounds", "clock", "machine")]
    lines = [columns, *([cell(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def draw(rows, path, title):
    """Bars of forward and backward together, in milliseconds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if row["direction"] == "both"]
    operations = list(dict.fromkeys(row["operation"] for row in rows))
    figure, axes = plt.subplots(1, max(1, len(operations)), figsize=(13, 6), squeeze=False, layout="constrained")
    for axis, operation in zip(axes[0], operations, strict=False):
        mine = [row for row in rows if row["operation"] == operation]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        for offset, provider in enumerate(PROVIDERS):
            of = {row["shape"]: row for row in mine if row["provider"] == provider}
            places = [(i + 0.27 * (offset - 1), of[shape]) for i, shape in enumerate(shapes) if shape in of]
            errors = [[r["ms"] - r["ms_20"] for _, r in places], [r["ms_80"] - r["ms"] for _, r in places]]
            axis.barh([y for y, _ in places], [r["ms"] for _, r in places], 0.25, xerr=errors, label=provider)
        axis.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("ms of a forward and its backward")
        axis.set_title(operation, fontsize=10)
        axis.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def benchmark(options, shapes=None):
    """Measure, write kernels-cpu.csv and kernels-cpu.png, and print the table; the exit status.

    Args:
        options: the parsed options of `benchmarks.kernels`.
        shapes: dict from operation to shapes that replace SHAPES.
    """
    device = torch.device("cpu")
    if options.threads:
        torch.set_num_threads(options.threads)
    tune_host(device)
    torch.manual_seed(0)
    without = () if can_compile(device) else ("compiled",)
    if without:
        print("benchmarks.kernels: there is no C++ compiler, so torch.compile of the chain is not measured")
    ran_on = machine(device, {p: matmul_peak(device, p, options.clock) for p in ("bf16", "fp32")})
    rows = []
    for operation in options.operations:
        if operation not in (shapes or SHAPES):
            print(f"{operation} is not measured on a CPU, where it runs the plain PyTorch lines", file=sys.stderr)
        for shape in (shapes or SHAPES).get(operation, ())[: 2 if options.quick else None]:
            print(f"measuring {operation} {label(operation, shape)}", file=sys.stderr, flush=True)
            with precision(operation, shape, device):
                rows += measure(operation, shape, options.rounds, options.clock, without)
            torch._dynamo.reset()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "kernels-cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            row = {**row, "machine": ran_on}
            writer.writerow({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
    title = f"{ran_on}; {options.clock} clock, {options.rounds} rounds"
    draw(rows, out / "kernels-cpu.png", f"{title}\nbars: medians; whiskers: 20th to 80th percentile")
    print(table(rows))
    print(title)
    print(f"written to {out}/kernels-cpu.csv and {out}/kernels-cpu.png")
    return 1 if any(row["ms"] == "" for row in rows) else 0
