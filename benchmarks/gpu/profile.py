"""The most expensive kernels of a training step: share of time, FLOP/s or bytes/s, and share of the measured ceiling.

The profiled step is launched kernel by kernel, because torch then knows the operation and the shapes of each kernel.
FLOPs are those of the operation's matrix products (2 per multiply-add, counted from the shapes); bytes are its inputs
and outputs, each counted once. If an operation launches several kernels, both are assigned to the longest one. The
ceilings are a large matrix product and a large copy, measured in the same process. A kernel's share is its share of the
closer ceiling.
"""

import collections
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from torch.utils.flop_counter import flop_registry

from benchmarks.gpu.rows import Rows
from benchmarks.gpu.steps import make_case, parser_of
from benchmarks.kernels.timing import GPU, HOST
from benchmarks.steps.clock import matmul_peak, synchronize
from benchmarks.steps.command import can_compile
from benchmarks.steps.report import machine
from maskalign.runtime.device import tune_host

COLUMNS = [
    "case", "rank", "kernel", "launches", "us", "share", "tflops", "gb_per_s", "ceiling", "share_of_ceiling",
    "kernels_us", "wall_us", "matmul_tflops", "copy_gb_per_s", "preset", "batch_size", "precision",
]  # fmt: skip
KEPT = 15
STEPS = 3
ITEMSIZE = {
    "float": 4, "c10::BFloat16": 2, "c10::Half": 2, "double": 8, "signed char": 1, "unsigned char": 1, "int": 4,
    "long": 8, "long int": 8, "bool": 1,
}  # fmt: skip
GPU_EVENTS = ("kernel", "gpu_memcpy", "gpu_memset")


class Launch(NamedTuple):
    """One kernel, or on a CPU one operation without nested ones. us: microseconds; flops, moved: None if unknown."""

    name: str
    us: float
    flops: Optional[float]
    moved: Optional[float]


def launches_of(trace):
    """The list of `Launch` in a Chrome trace of torch.profiler with shapes."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    operations = {
        e["args"]["External id"]: e for e in events if e.get("cat") == "cpu_op" and "External id" in e["args"]
    }
    kernels = [event for event in events if event.get("cat") in GPU_EVENTS]
    if not kernels:
        own = own_times(list(operations.values()))
        return [Launch(e["name"], us, flops_of(e), bytes_of(e)) for e, us in own if us > 0]
    of_operation = collections.defaultdict(list)
    for kernel in kernels:
        of_operation[kernel["args"].get("External id")].append(kernel)
    found = []
    for number, group in of_operation.items():
        operation = operations.get(number)
        longest = max(group, key=lambda kernel: kernel["dur"])
        for kernel in group:
            known = operation is not None and kernel is longest
            counts = (flops_of(operation), bytes_of(operation)) if known else (None, None)
            found.append(Launch(kernel["name"], kernel["dur"], *counts))
    return found


def own_times(operations):
    """list of (operation, its microseconds without nested operations), for the events of each thread."""
    own = {id(e): e["dur"] for e in operations}
    for thread in {e.get("tid") for e in operations}:
        stack = []
        for event in sorted((e for e in operations if e.get("tid") == thread), key=lambda e: (e["ts"], -e["dur"])):
            while stack and event["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
                stack.pop()
            if stack:
                own[id(stack[-1])] -= event["dur"]
            stack.append(event)
    return [(e, own[id(e)]) for e in operations]


def flops_of(operation):
    """FLOPs of an operation's matrix products, by torch's own formulas; None for operations without a formula."""
    name = operation["name"].partition("::")[2] if operation["name"].startswith("aten::") else ""
    count = flop_registry.get(getattr(torch.ops.aten, name, None)) if name else None
    dims = operation["args"].get("Input Dims", [])
    if count is None:
        return None
    try:
        return float(count(*(torch.Size(d) if d else None for d in dims), out_val=None))
    except Exception:  # A formula that needs more than the sizes of the tensors.
        return None


def bytes_of(operation):
    """Bytes of an operation's inputs and outputs, each counted once; None if no shape is known."""
    dims, types = operation["args"].get("Input Dims", []), operation["args"].get("Input type", [])
    sizes = [_footprint(d, t) for d, t in zip(dims, types, strict=False)]
    if not any(sizes):
        return None
    name = operation["name"]
    width = next((ITEMSIZE[t] for t in types if t in ITEMSIZE), 4)
    tensors = [d for d in dims if d and not isinstance(d[0], list)]
    if name in ("aten::mm", "aten::addmm", "aten::bmm") and len(tensors) >= 2:
        a, b = tensors[-2:]
        return sum(sizes) + width * math.prod(a[:-1]) * b[-1]
    # The inputs of a kernel from torch.compile include its outputs. For other operations, the output is assumed to be
    # as large as the largest input.
    return sum(sizes) + (max(sizes) if name.startswith("aten::") else 0)


def _footprint(dims, kind):
    """Bytes of a tensor, or of the tensors in a list."""
    if dims and isinstance(dims[0], list):
        return sum(4 * math.prod(d) for d in dims if d)
    return ITEMSIZE[kind] * math.prod(dims) if dims and kind in ITEMSIZE else 0


def rows_of(launches, steps, peak, bandwidth):
    """The KEPT kernels with most time, as dicts.

    Args:
        launches: list of `Launch`, of all steps.
        steps: number of steps.
        peak: FLOP/s of a matrix product.
        bandwidth: bytes/s of a copy.
    """
    by_name = collections.defaultdict(list)
    for launch in launches:
        by_name[launch.name].append(launch)
    total = sum(launch.us for launch in launches)
    rows = []
    for name, of in sorted(by_name.items(), key=lambda item: -sum(launch.us for launch in item[1]))[:KEPT]:
        us = sum(launch.us for launch in of)
        speeds = {}
        for key, ceiling in (("flops", peak), ("moved", bandwidth)):
            counted = [launch for launch in of if getattr(launch, key) is not None]
            if counted:
                seconds = 1e-6 * sum(launch.us for launch in counted)
                speeds[key] = sum(getattr(launch, key) for launch in counted) / seconds, ceiling
        nearest = max(speeds, key=lambda key: speeds[key][0] / speeds[key][1], default=None)
        rows.append({
            "kernel": name[:120], "launches": len(of) / steps, "us": us / steps, "share": us / total,
            "tflops": speeds["flops"][0] / 1e12 if "flops" in speeds else None,
            "gb_per_s": speeds["moved"][0] / 1e9 if "moved" in speeds else None,
            "ceiling": {"flops": "matmul", "moved": "copy", None: None}[nearest],
            "share_of_ceiling": None if nearest is None else speeds[nearest][0] / speeds[nearest][1],
            "kernels_us": total / steps,
        })  # fmt: skip
    return rows


def trace_of(case, device, steps):
    """(Chrome trace of some steps that are launched kernel by kernel, microseconds of wall time per step)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with case.kernel_by_kernel(), tempfile.TemporaryDirectory() as folder:
        for _ in range(steps):  # compile and allocate
            case.step()
        synchronize(device)
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(steps):
                with torch.profiler.record_function("step"):
                    case.step()
            synchronize(device)
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    walls = [e["dur"] for e in trace["traceEvents"] if e.get("name") == "step" and e.get("cat") == "user_annotation"]
    return trace, statistics.median(walls) if walls else None


def main(argv=None):
    options = parser_of("profile", __doc__.split("\n")[0]).parse_args(argv)
    device = torch.device(options.device)
    options.compile = not options.rehearse and can_compile(device)
    tune_host(device)
    peak = matmul_peak(device, options.precision, size=128 if options.rehearse else None)
    bandwidth = 1e9 * (GPU if device.type == "cuda" else HOST).copy_bandwidth(device)
    common = {"machine": machine(device, {options.precision: peak}), "rehearsal": int(options.rehearse)}
    rows, failed = Rows(options.out, COLUMNS, **common), False
    for name in options.cases.split(","):
        try:
            case = make_case(name, options, device)
            steps = 1 if options.rehearse else STEPS
            trace, wall = trace_of(case, device, steps)
            found = rows_of(launches_of(trace), steps, peak, bandwidth)
            case.close()
        except Exception as error:  # The other case can still be profiled.
            failed = True
            print(f"{name}: {type(error).__name__}: {error}".splitlines()[0], file=sys.stderr, flush=True)
            continue
        for number, row in enumerate(found, 1):
            rows.add(
                case=name, rank=number, wall_us=wall, matmul_tflops=peak / 1e12, copy_gb_per_s=bandwidth / 1e9,
                preset=options.preset, batch_size=options.batch_size, precision=options.precision, **row,
            )  # fmt: skip
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
