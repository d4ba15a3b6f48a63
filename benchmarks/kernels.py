"""Time and memory of both kernels on the GPU of this machine, against eager PyTorch and its compiled twin.

    python -m benchmarks.kernels [--out DIR] [--operations ...] [--quick]

Per operation and shape, forward, backward and both: median milliseconds with the 20th and 80th percentile, the bytes
that the kernels' launches move by their geometry, GB/s, the share of the copy bandwidth that this GPU reaches in the
same run, and the peak memory on top of the arguments. These launches take microseconds, less than Python needs to issue
them: `ms` is the time of a captured CUDA graph (triton.testing.do_bench, which clears L2 before each run), `call_ms`
that of plain calls, as an eager training loop sees them. A provider whose result is off is reported, not timed.
Rows go to kernels.csv, a figure to kernels.png. Without a CUDA or ROCm device there is nothing to measure: one line
says so.

The providers: `kernel` (maskalign_kernels), `eager` (the chain as training codes write it), `compiled` (torch.compile
of the same chain). The shapes and the chain are those of benchmarks.kernel_report; where weights and products have
other dtypes than the tokens, all three run under autocast.
"""

import argparse
import contextlib
import csv
import pathlib
import sys

import torch

from benchmarks import kernel_report
from maskalign_kernels import mix_and_drop, subset_cosine_alignment

COLUMNS = [
    "operation", "shape", "direction", "provider", "ms", "ms_20", "ms_80", "call_ms", "bytes", "gb_per_s", "of_copy",
    "peak_mib", "error",
]  # fmt: skip
DIRECTIONS = ("forward", "backward", "both")


def alignment_setup(shape, device):
    """(arguments, differentiable ones, {provider: function}) of one of SHAPES; the student row for row."""
    images, tokens, kept, width, student, teacher = shape
    s = torch.randn(images, kept, width, device=device).to(student).requires_grad_()
    z = torch.randn(images, tokens, width, device=device)
    z = (z * 40).round().clamp(-127, 127).to(teacher) if teacher == torch.int8 else z.to(teacher)
    subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values

    def chain(s, z, subset):
        return kernel_report.unfused_alignment(s, z, subset, True)

    return (s, z, subset), [s], {"kernel": subset_cosine_alignment, "eager": chain, "compiled": torch.compile(chain)}


def mix_setup(shape, device):
    """As alignment_setup, for mix_and_drop: tokens and vectors in the shape's first dtype, weights in its second."""
    images, tokens, kept, width, hidden, x, weight, _ = shape
    sizes = [(images, tokens, width), *[(images, width)] * 3, (hidden, tokens), (hidden,), (tokens, hidden), (tokens,)]
    scales = [1, 1, 0.3, 1, tokens**-0.5, 0.1, hidden**-0.5, 0.1]
    dtypes = [x] * 4 + [weight] * 4
    tensors = [
        (torch.randn(size, device=device) * by).to(dtype).requires_grad_()
        for size, by, dtype in zip(sizes, scales, dtypes, strict=True)
    ]
    subset = None
    if kept is not None:
        subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    chain = kernel_report.unfused_mix
    return (*tensors, subset), tensors, {"kernel": mix_and_drop, "eager": chain, "compiled": torch.compile(chain)}


SETUPS = {"subset_cosine_alignment": alignment_setup, "mix_and_drop": mix_setup}


def precision(operation, shape, device):
    """autocast to the products' dtype where weights or tokens have another one; else nothing."""
    if operation != "mix_and_drop" or len(set(shape[5:])) == 1:
        return contextlib.nullcontext()
    return torch.autocast(device.type, shape[7])


def runners(function, arguments, leaves):
    """{direction: thunk}. The backward runs again and again on one graph."""
    out = function(*arguments)
    gradient = torch.randn_like(out)
    return {
        "forward": lambda: function(*arguments),
        "backward": lambda: torch.autograd.grad(out, leaves, gradient, retain_graph=True),
        "both": lambda: torch.autograd.grad(function(*arguments), leaves, gradient),
    }


def relative_error(function, exact, arguments, leaves):
    """The larger relative error of the result and of the gradients, against the chain in float64 on the same values."""

    def outcome(function, arguments, leaves):
        out = function(*arguments)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
        return [out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    wide = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.dtype == torch.int8) else a
        for a in arguments
    ]  # fmt: skip
    with torch.autocast(arguments[0].device.type, enabled=False):
        truths = outcome(exact, wide, [a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad])
    found = outcome(function, arguments, leaves)
    return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truths, strict=True))


def captured(run):
    """`run` as one launch of a CUDA graph: the work of the GPU without Python's part.

    On the current stream, which must not be the default one: autograd runs a backward where its forward ran.
    """
    for _ in range(3):  # Compiles and allocates what is left to, which a capture may not.
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def copy_bandwidth(device):
    """GB/s of copying 1 GiB on the device, reading and writing counted."""
    import triton

    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def peak_memory(run):
    """MiB allocated at most while `run` runs, over what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def moved_bytes(operation, shape):
    """{direction: bytes} of the kernels' launches, in the default configuration."""
    total = dict.fromkeys(DIRECTIONS, 0)
    for case in kernel_report.CASES[operation].aot_cases([shape], every_configuration=False):
        if case.operation == operation and not case.launch.startswith("gathered"):
            total[case.direction] += case.moved
            total["both"] += case.moved
    return total


def measure(operation, shape, bandwidth, device):
    """Yield one row (a dict with COLUMNS) per provider and direction."""
    import triton

    moved = moved_bytes(operation, shape)
    label = next(iter(kernel_report.CASES[operation].aot_cases([shape], every_configuration=False))).shape
    arguments, leaves, functions = SETUPS[operation](shape, device)
    dtypes = [t.dtype for t in leaves] + [d for d in shape[5:] if d.is_floating_point]
    narrow = max(torch.finfo(dtype).eps for dtype in dtypes)
    for provider, function in functions.items():
        error = relative_error(function, functions["eager"], arguments, leaves)
        row = {"operation": operation, "shape": label, "provider": provider, "error": error}
        if not error < 8 * narrow + 2e-3:
            yield {**dict.fromkeys(COLUMNS, ""), **row, "direction": "wrong result, not timed"}
            continue
        for direction, run in runners(function, arguments, leaves).items():
            calls = triton.testing.do_bench(run, return_mode="median")
            peak = peak_memory(run)
            ms, low, high = triton.testing.do_bench(captured(run), quantiles=[0.5, 0.2, 0.8])
            # GB/s of useful bytes: the same for every provider, so that faster is more.
            speed = moved[direction] / ms / 1e6
            yield {
                **row, "direction": direction, "ms": ms, "ms_20": low, "ms_80": high, "call_ms": calls,
                "bytes": moved[direction], "gb_per_s": speed, "of_copy": speed / bandwidth, "peak_mib": peak,
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
        for offset, provider in enumerate(("kernel", "eager", "compiled")):
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


def benchmark(operations, shapes, device, out):
    """Measure, print as it goes, and write kernels.csv and kernels.png; the exit status."""
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s"
    print(title)
    rows = []
    for operation in operations:
        for shape in shapes[operation]:
            with torch.cuda.stream(torch.cuda.Stream()), precision(operation, shape, device):
                for row in measure(operation, shape, bandwidth, device):
                    rows.append(row)
                    print("  ".join(kernel_report.cell(row[c]) for c in COLUMNS), flush=True)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "kernels.png", title)
    print(f"written to {out}/kernels.csv and {out}/kernels.png")
    return 1 if any(row["ms"] == "" for row in rows) else 0


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="runs/kernels", help="folder for kernels.csv and kernels.png")
    parser.add_argument("--operations", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--quick", action="store_true", help="the first two shapes of each operation only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.kernels: skipped, no CUDA or ROCm device here; nothing was measured on a GPU.")
        return 0
    shapes = {name: module.SHAPES[: 2 if options.quick else None] for name, module in kernel_report.CASES.items()}
    return benchmark(options.operations, shapes, torch.device("cuda"), pathlib.Path(options.out))


if __name__ == "__main__":
    sys.exit(main())
