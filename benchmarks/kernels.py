"""Time and memory of both kernels on the GPU of this machine, against eager PyTorch and its compiled twin.

    python -m benchmarks.kernels [--out DIR] [--operations ...] [--quick]

Per operation and shape, forward, backward and both: median milliseconds (triton.testing.do_bench: the L2
cache is cleared before each run) with the 20th and 80th percentile, the bytes that the launches move by their
geometry, GB/s, the share of the copy bandwidth that this GPU reaches in the same run, and the peak memory on
top of the arguments. A provider whose result is off is reported as such and not timed. Rows go to
kernels.csv, a figure to kernels.png. Without a CUDA or ROCm device there is nothing to measure: one line says
so.

The providers: `kernel` (maskalign_kernels), `eager` (the chain as training codes write it), `compiled`
(torch.compile of the same chain). The shapes and the chain are those of benchmarks.kernel_report.
"""

import argparse
import csv
import pathlib
import sys

import torch

from benchmarks import kernel_report
from maskalign_kernels import mix_and_drop, subset_cosine_alignment

COLUMNS = [
    "operation", "shape", "direction", "provider", "ms", "ms_20", "ms_80", "bytes", "gb_per_s", "of_copy",
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

    functions = {"kernel": subset_cosine_alignment, "eager": chain, "compiled": torch.compile(chain)}
    return (s, z, subset), [s], functions


def mix_setup(shape, device):
    """As alignment_setup, for mix_and_drop. All arguments in the product's dtype, which is what the chain can
    take.
    """
    images, tokens, kept, width, hidden, _, _, product = shape
    sizes = [
        (images, tokens, width),
        *[(images, width)] * 3,
        (hidden, tokens),
        (hidden,),
        (tokens, hidden),
        (tokens,),
    ]
    scales = [1, 1, 0.3, 1, tokens**-0.5, 0.1, hidden**-0.5, 0.1]
    tensors = [
        (torch.randn(size, device=device) * by).to(product).requires_grad_()
        for size, by in zip(sizes, scales, strict=True)
    ]
    subset = None
    if kept is not None:
        subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    chain = kernel_report.unfused_mix
    functions = {"kernel": mix_and_drop, "eager": chain, "compiled": torch.compile(chain)}
    return (*tensors, subset), tensors, functions


SETUPS = {"subset_cosine_alignment": alignment_setup, "mix_and_drop": mix_setup}


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
    """The larger relative error of the result and of the gradients, against the chain in float64 on the same
    values.
    """

    def outcome(function, arguments, leaves):
        out = function(*arguments)
        weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
        return [out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))]

    wide = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.dtype == torch.int8) else a
        for a in arguments
    ]  # fmt: skip
    truths = outcome(exact, wide, [a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad])
    found = outcome(function, arguments, leaves)
    return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truths, strict=True))


def copy_bandwidth(device):
    """GB/s of copying 1 GiB on the device, reading and writing counted."""
    import triton

    source = torch.empty(2**28, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6


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
    narrow = min(torch.finfo(t.dtype).eps for t in leaves)
    for provider, function in functions.items():
        error = relative_error(function, functions["eager"], arguments, leaves)
        row = {"operation": operation, "shape": label, "provider": provider, "error": error}
        if not error < 8 * narrow + 2e-3:
            yield {**dict.fromkeys(COLUMNS, ""), **row, "direction": "wrong result, not timed"}
            continue
        for direction, run in runners(function, arguments, leaves).items():
            quantiles = triton.testing.do_bench(run, quantiles=[0.5, 0.2, 0.8])
            ms, low, high = quantiles
            speed = moved[direction] / ms / 1e6
            yield {
                **row,
                "direction": direction,
                "ms": ms,
                "ms_20": low,
                "ms_80": high,
                "bytes": moved[direction],
                # GB/s of useful bytes: the same for every provider, so that faster is more.
                "gb_per_s": speed,
                "of_copy": speed / bandwidth,
                "peak_mib": peak_memory(run),
            }


def draw(rows, path, title):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [row for row in rows if row["ms"] != ""]
    operations = list(dict.fromkeys(row["operation"] for row in timed))
    figure, axes = plt.subplots(len(operations), 1, figsize=(11, 5 * len(operations)), squeeze=False)
    for axis, operation in zip(axes[:, 0], operations, strict=True):
        mine = [row for row in timed if row["operation"] == operation and row["direction"] == "both"]
        shapes = list(dict.fromkeys(row["shape"] for row in mine))
        for offset, provider in enumerate(("kernel", "eager", "compiled")):
            of = {row["shape"]: row["of_copy"] for row in mine if row["provider"] == provider}
            axis.barh(
                [i + 0.27 * (offset - 1) for i in range(len(shapes))],
                [of.get(s, 0) for s in shapes],
                0.25,
                label=provider,
            )
        axis.set_yticks(range(len(shapes)), shapes, fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel("useful bytes per second, forward and backward, over the measured copy")
        axis.set_title(f"{operation}: {title}", fontsize=9)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="runs/kernels", help="folder for kernels.csv and kernels.png")
    parser.add_argument("--operations", nargs="+", default=list(SETUPS), choices=list(SETUPS))
    parser.add_argument("--quick", action="store_true", help="the first two shapes of each operation only")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.kernels: skipped, no CUDA or ROCm device here; nothing was measured on a GPU.")
        return 0
    device = torch.device("cuda")
    torch.manual_seed(0)
    bandwidth = copy_bandwidth(device)
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth:.0f} GB/s"
    print(title)
    rows = []
    for operation in options.operations:
        for shape in kernel_report.CASES[operation].SHAPES[: 2 if options.quick else None]:
            for row in measure(operation, shape, bandwidth, device):
                rows.append(row)
                print("  ".join(kernel_report.cell(row[c]) for c in COLUMNS), flush=True)
            torch._dynamo.reset()
            torch.cuda.empty_cache()
    out = pathlib.Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "kernels.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, out / "kernels.png", title)
    print(f"written to {out}/kernels.csv and {out}/kernels.png")
    return 1 if any(row["ms"] == "" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
