"""Time and memory of the operations on this machine, compared with PyTorch, eager and compiled.

    python -m benchmarks.kernels [--device auto|cpu|cuda] [--out DIR] [--operations ...] [--quick] [--configurations]

On a GPU, the rows have for each operation and shape, and for forward, backward and both: median milliseconds with the
20th and 80th percentile, the bytes that the kernels' launches move by their geometry, GB/s, the share of this GPU's
copy bandwidth in the same run, and the peak memory without the arguments. These launches take microseconds, which is
less than Python needs to issue them. `ms` is therefore the time of a captured CUDA graph (triton.testing.do_bench,
which clears L2 before each run), and `call_ms` is the time of plain calls, as in an eager training loop. `of_copy` is
the share of the bandwidth of copying 1 GiB, which no launch of microseconds reaches; `of_same_copy` is the share of the
bandwidth of copying as many bytes as the launches move, timed in the same way. A provider with a wrong result is
reported and not timed. Rows are written to kernels.csv, a figure to kernels.png. The shapes are those of
benchmarks.kernel_report. If weights and products have other dtypes than the tokens, all providers run under autocast.

`--configurations` times all configurations that tuning chooses from, see benchmarks.kernels.configurations.

`--device cpu` measures the CPU path, see benchmarks.kernels.cpu. By default the command uses a GPU, and prints one line
if there is none.
"""

import argparse
import csv
import pathlib

import torch
from torch._functorch import config as functorch

from benchmarks import kernel_report
from benchmarks.kernels import configurations
from benchmarks.kernels.cases import (
    DIRECTIONS,
    PROVIDERS,
    SETUPS,
    default_launches,
    label,
    precision,
    relative_error,
    tolerated_error,
)
from benchmarks.kernels.timing import GPU
from benchmarks.steps.clock import CLOCKS

COLUMNS = [
    "operation", "shape", "direction", "provider", "ms", "ms_20", "ms_80", "call_ms", "bytes", "gb_per_s", "of_copy",
    "of_same_copy", "peak_mib", "error", "machine",
]  # fmt: skip


def runners(function, arguments, leaves):
    """dict from direction to a function without arguments; the backward is repeated on one autograd graph."""
    outs = kernel_report.outputs(function(*arguments))
    gradients = [torch.randn_like(out) for out in outs]
    return {
        "forward": lambda: function(*arguments),
        "backward": lambda: torch.autograd.grad(outs, leaves, gradients, retain_graph=True),
        "both": lambda: torch.autograd.grad(kernel_report.outputs(function(*arguments)), leaves, gradients),
    }


def moved_bytes(operation, shape):
    """{direction: bytes} of the kernels' launches, in the default configuration."""
    total = dict.fromkeys(DIRECTIONS, 0)
    for case in default_launches(operation, shape):
        total[case.direction] += case.moved
        total["both"] += case.moved
    return total


def measure(operation, shape, bandwidth, device, clock=GPU, providers=PROVIDERS):
    """Yield one row (a dict with COLUMNS) per provider and direction, see `measured`."""
    moved = moved_bytes(operation, shape)
    same = {direction: clock.copy_bandwidth(device, count) for direction, count in moved.items()}
    arguments, leaves, functions = SETUPS[operation](shape, device)
    for provider in providers:
        function = functions[provider]
        error = relative_error(function, functions["eager"], arguments, leaves)
        row = {"operation": operation, "shape": label(operation, shape), "provider": provider, "error": error}
        if not error < tolerated_error(shape, leaves):
            yield {**dict.fromkeys(COLUMNS, ""), **row, "direction": "wrong result, not timed"}
            continue
        for direction, run in runners(function, arguments, leaves).items():
            calls = clock.call_ms(run)
            peak = clock.peak_memory(run)
            ms, low, high = clock.graph_ms(run)
            # GB/s of useful bytes, which are the same for every provider, so that a faster provider has more GB/s.
            speed = moved[direction] / ms / 1e6
            yield {
                **row, "direction": direction, "ms": ms, "ms_20": low, "ms_80": high, "call_ms": calls,
                "bytes": moved[direction], "gb_per_s": speed, "of_copy": speed / bandwidth,
                "of_same_copy": speed / same[direction], "peak_mib": peak,
            }  # fmt: skip


def draw(rows, path, title):
    """Bars of forward and backward together, as shares of the copy bandwidth."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["ms"] != ""]
    operations = list(dict.fromkeys(row["operation"] for row in timed))
    figure, axes = plt.subplots(max(1, len(operations)), 1, figsize=(11, 5 * max(1, len(operations))), squeeze=False)
    for axis, operation in zip(axes[:, 0], operations, strict=False):
        mine = [row for row in timed if row["operation"] == operation and row["direction"] == "both"]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        for offset, provider in enumerate(PROVIDERS):
            of = {row["shape"]: row["of_copy"] for row in mine if row["provider"] == provider}
            places = [i + 0.27 * (offset - 1) for i in range(len(shapes))]
            axis.barh(places, [of.get(s, 0) for s in shapes], 0.25, label=provider)
        axis.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("useful bytes per second, forward and backward, over the measured copy")
        axis.set_title(f"{operation}: {title}", fontsize=9)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def measured(operations, shapes, device, clock=GPU, providers=PROVIDERS):
    """Yield the rows (dicts with COLUMNS) of all operations on their shapes, as they are measured.

    Args:
        shapes: list of an operation's SHAPES, by its name.
        clock: `timing.GPU`, or `timing.HOST` to rehearse the same code on a CPU.
        providers: of PROVIDERS, in the order in which they are measured.
    """
    torch.manual_seed(0)
    # The backward is timed alone, repeatedly on one graph. A compiled backward would otherwise free parts of it.
    functorch.donated_buffer = False
    bandwidth = clock.copy_bandwidth(device)
    title = f"{clock.name()}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s"
    print(title)
    for operation in operations:
        for shape in shapes[operation]:
            with clock.stream(), precision(operation, shape, device):
                for row in measure(operation, shape, bandwidth, device, clock, providers):
                    print("  ".join(kernel_report.cell(row[c]) for c in COLUMNS[:-1]), flush=True)
                    yield row | {"machine": title}
            torch._dynamo.reset()
            clock.free()


def benchmark(operations, shapes, device, out):
    """Measure, print as it goes, and write kernels.csv and kernels.png; the exit status."""
    rows = list(measured(operations, shapes, device))
    title = rows[0]["machine"]
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "kernels.png", title)
    print(f"written to {out}/kernels.csv and {out}/kernels.png")
    return 1 if any(row["ms"] == "" for row in rows) else 0


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--out", default="runs/kernels", help="folder for the CSV and the PNG")
    parser.add_argument("--operations", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--quick", action="store_true", help="the first two shapes of each operation only")
    parser.add_argument("--configurations", action="store_true", help="time every launch in every configuration")
    cpu = parser.add_argument_group("with --device cpu")
    cpu.add_argument("--rounds", type=int, default=25)
    cpu.add_argument("--threads", type=int, help="CPU threads")
    cpu.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: CPU time, needs one thread")
    options = parser.parse_args(arguments)
    if options.clock == "cpu" and (options.device != "cpu" or options.threads != 1):
        parser.error("--clock cpu needs --device cpu --threads 1, because threads that wait would be counted")
    if options.rounds < 1 or (options.threads is not None and options.threads < 1):
        parser.error("--rounds and --threads must be at least 1")
    if options.device == "cpu":
        from benchmarks.kernels import cpu  # The training stack, which takes seconds to import.

        return cpu.benchmark(options)
    if not torch.cuda.is_available():
        hint = "--device cpu measures the CPU path"
        print(f"benchmarks.kernels: skipped, no CUDA or ROCm device here; nothing was measured on a GPU; {hint}.")
        return 0 if options.device == "auto" else 1
    shapes = {name: module.SHAPES[: 2 if options.quick else None] for name, module in kernel_report.CASES.items()}
    run = configurations.benchmark if options.configurations else benchmark
    return run(options.operations, shapes, torch.device("cuda"), pathlib.Path(options.out))
