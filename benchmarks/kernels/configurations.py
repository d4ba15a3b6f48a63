"""Time every launch of the operations on this GPU in every configuration that tuning chooses from.

    python -m benchmarks.kernels --configurations [--operations ...] [--quick] [--out DIR]

There is one row per shape, launch and configuration. It has the microseconds of the launch as a captured graph, where
L2 is cleared before each run (in a real step, `mix` finds a part of x in L2 because `statistics` has just read it), and
the bandwidth of the launch's bytes in its default configuration, as a share of the bandwidth of copying as many bytes.
Rows are written to kernels-configurations.csv. The first configuration of a launch is its default, which is used unless
MASKALIGN_KERNELS_AUTOTUNE selects another one, see tuning.py.
"""

import contextlib
import csv

import torch

from benchmarks import kernel_report
from benchmarks.kernels.cases import SETUPS, default_launches, label, precision
from benchmarks.kernels.timing import copy_bandwidth, graph_ms
from maskalign_kernels.adaln import launch as adaln_launch
from maskalign_kernels.mix_and_drop import launch as mix_launch
from maskalign_kernels.operators import triton
from maskalign_kernels.subset_cosine_alignment import launch as alignment_launch

COLUMNS = ["operation", "shape", "launch", "configuration", "default", "us", "us_20", "us_80", "bytes", "of_same_copy"]


def launches(operation, arguments):
    """Run the operation's launches once, forward and backward, without autograd: its kernels are the same."""
    operators = torch.ops.maskalign_kernels
    if operation == "subset_cosine_alignment":
        student, teacher, subset = arguments
        cosine, saved = operators.subset_cosine_alignment(student, teacher, subset, True, 1e-12)
        operators.subset_cosine_alignment_backward(torch.ones_like(cosine), student, teacher, subset, saved, True)
        return
    *tensors, subset = arguments
    if operation in kernel_report.UNFUSED_ADALN:
        adaln_launches(operation, tensors, subset)
        return
    product = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensors[0].dtype
    out, mean, rstd = operators.mix_and_drop(*tensors, subset, product)
    operators.mix_and_drop_backward(torch.randn_like(out), *tensors, subset, mean, rstd, product)


def adaln_launches(operation, tensors, subset):
    """The same for one of the adaLN operations."""
    operators, tokens = torch.ops.maskalign_kernels, tensors[0].shape[1]
    if operation == "gated_residual":
        y = operators.gated_residual(*tensors, subset)
        operators.gated_residual_backward(torch.randn_like(y), *tensors[1:], subset, tokens)
        return
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else tensors[0].dtype
    *y, u, mean, rstd = getattr(operators, operation)(*tensors, subset, dtype)
    du = torch.randn_like(u)
    if operation == "adaln_modulate":
        operators.adaln_modulate_backward(du, *tensors, subset, mean, rstd)
        return
    dy = torch.randn_like(y[0])
    operators.gated_residual_adaln_backward(dy, du, *y, *tensors[1:], subset, mean, rstd, tokens)


def launch_name(name, key):
    """The name of a launch in the report's cases, from the name and key in a call of `tuning.choose`."""
    if name != "tokens":
        return name.removeprefix("alignment_").removeprefix("adaln_")
    first, second = key[-2:]
    return "tokens" if first and second else "tokens first" if first else "tokens second"


def default_bytes(operation, shape):
    """{name of a launch: bytes that it moves in its default configuration}; the alignment has one per direction."""
    by_direction = operation == "subset_cosine_alignment"
    return {case.direction if by_direction else case.launch: case.moved for case in default_launches(operation, shape)}


@contextlib.contextmanager
def choosing(choose):
    """Context in which all operations call `choose` for a configuration instead of `tuning.choose`."""
    modules = (alignment_launch, mix_launch, adaln_launch)
    before = [module.choose for module in modules]
    for module in modules:
        module.choose = choose
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.choose = original


def measure(operation, shape, device):
    """Yield one row (a dict with COLUMNS) per launch and configuration."""
    arguments, _, _ = SETUPS[operation](shape, device)
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in arguments]
    asked = []

    def choose(name, key, configs, tensor, launch):
        asked.append((launch_name(name, key), configs, launch))
        return configs[0]

    with torch.no_grad(), choosing(choose):
        launches(operation, arguments)
        moved = default_bytes(operation, shape)
        for name, configs, launch in asked:
            same = copy_bandwidth(device, moved[name])
            for number, config in enumerate(configs):
                row = {
                    "operation": operation, "shape": label(operation, shape), "launch": name,
                    "configuration": " ".join(f"{k}={v}" for k, v in config.items()),
                    "default": int(number == 0), "bytes": moved[name],
                }  # fmt: skip
                try:
                    ms, low, high = graph_ms(lambda launch=launch, config=config: launch(config))
                except triton.runtime.errors.OutOfResources:
                    yield {**dict.fromkeys(COLUMNS, ""), **row}
                    continue
                share = moved[name] / ms / 1e6 / same
                yield row | {"us": 1e3 * ms, "us_20": 1e3 * low, "us_80": 1e3 * high, "of_same_copy": share}


def benchmark(operations, shapes, device, out):
    """Measure, print as it goes, and write kernels-configurations.csv; the exit status."""
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    rows = []
    for operation in operations:
        for shape in shapes[operation]:
            with torch.cuda.stream(torch.cuda.Stream()), precision(operation, shape, device):
                for row in measure(operation, shape, device):
                    rows.append(row)
                    print("  ".join(kernel_report.cell(row[c]) for c in COLUMNS), flush=True)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "kernels-configurations.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {path}")
    return 0
