"""Step times at one model size, as CUDA graphs if steps can be captured: one row of the CSV for each case.

A case is a recipe, `recipe@keep` with another keep ratio than in its file, a recipe with `-fused`
(`model.fused_adaln`), or `reference`, which is the public REPA or REG code as published. Steps are those of
benchmarks.steps, on latents and cached teacher features in memory. They are timed in groups without waiting between
steps, as in a training loop.
"""

import argparse
import gc
import math
import os
import socket
import statistics
import sys
import time

import torch

from benchmarks.gpu.rows import Rows
from benchmarks.steps.cases import OurCase
from benchmarks.steps.clock import matmul_peak, synchronize
from benchmarks.steps.command import can_compile
from benchmarks.steps.reference import ReferenceCase
from benchmarks.steps.report import machine
from maskalign.models.flops import step_flops
from maskalign.runtime.device import tune_host
from maskalign.runtime.ranks import leave_ranks

COLUMNS = [
    "case", "preset", "precision", "batch_size", "tokens", "plan", "compiled", "graph", "images_per_second", "step_ms",
    "step_ms_low", "step_ms_high", "steps", "gflops_per_image", "tflops", "matmul_tflops", "share_of_matmul_peak",
    "peak_mib", "loss", "error",
]  # fmt: skip


def make_case(name, options, device):
    """A case of benchmarks.steps."""
    if name == "reference":
        return ReferenceCase(options.reference, options.preset, options.batch_size, options.precision, device.type)
    recipe, _, keep = name.partition("@")
    return OurCase(
        recipe, options.preset, float(keep) if keep else None, options.batch_size, options.precision, device.type,
        compiled=options.compile, plan=options.plan,
    )  # fmt: skip


def time_steps(case, device, groups, group, warmup):
    """(list of the seconds of a step, one number for each group; the last loss)."""
    for _ in range(warmup):
        loss = case.step()
    synchronize(device)
    seconds = []
    for _ in range(groups):
        start = time.perf_counter()
        for _ in range(group):
            loss = case.step()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / group)
    return seconds, float(loss)


def measure(name, options, device, peak):
    """One row.

    Args:
        peak: FLOP/s of a matrix product.

    Raises:
        FloatingPointError: the loss is not finite, so no speed is reported.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    case = make_case(name, options, device)
    # Two steps that Python launches, the captured step, and one more.
    groups, group, warmup = (2, 1, 1) if options.rehearse else (8, 5, 4)
    try:
        seconds, loss = time_steps(case, device, groups, group, warmup)
        graphs = getattr(getattr(case, "train_step", None), "graphs", None)
        graph = getattr(graphs, "captured", None) is not None
        memory = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
        median = statistics.median(seconds)
        ours = isinstance(case, OurCase)
        flops = step_flops(case.model, case.kept) if ours else None
        tokens = f"{case.kept}/{case.model.num_tokens}" if ours else str(case.sizes["num_tokens"])
    finally:
        if hasattr(case, "close"):
            case.close()
    if not math.isfinite(loss):
        raise FloatingPointError("the loss is not finite")
    rate = None if flops is None else options.batch_size * flops / median
    return {
        "case": getattr(case, "name", name) if name == "reference" else name,
        "preset": options.preset, "precision": options.precision, "batch_size": options.batch_size, "tokens": tokens,
        "plan": options.plan, "compiled": int(options.compile and ours), "graph": int(graph),
        "images_per_second": options.batch_size / median, "step_ms": 1000 * median,
        "step_ms_low": 1000 * min(seconds), "step_ms_high": 1000 * max(seconds), "steps": groups * group,
        "gflops_per_image": None if flops is None else flops / 1e9, "tflops": None if rate is None else rate / 1e12,
        "matmul_tflops": peak / 1e12, "share_of_matmul_peak": None if rate is None else rate / peak,
        "peak_mib": memory, "loss": loss,
    }  # fmt: skip


def alone():
    """The environment variables of a process that is the only rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    os.environ |= {name: str(value) for name, value in alone.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def parser_of(module, description):
    """An argument parser with the options of all parts that build cases."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{module}", description=description)
    parser.add_argument("--out", required=True, help="the CSV")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--preset", default="SiT-B/2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--cases", default="repa,maskalign", help="names, with commas")
    parser.add_argument("--plan", choices=("none", "ddp", "fsdp"), default="none")
    parser.add_argument("--reference", help="checkout of the public code, for the case `reference`")
    return parser


def main(argv=None):
    options = parser_of("steps", __doc__.split("\n")[0]).parse_args(argv)
    device = torch.device(options.device)
    options.compile = not options.rehearse and can_compile(device)
    if options.plan != "none":
        alone()
    names = options.cases.split(",")
    if "reference" not in names:  # The public code runs with torch's default settings.
        tune_host(device)
    size = 128 if options.rehearse else None
    peak = matmul_peak(device, options.precision, size=size)
    common = {"machine": machine(device, {options.precision: peak}), "rehearsal": int(options.rehearse)}
    rows, failed = Rows(options.out, COLUMNS, **common), False
    for name in names:
        try:
            row = measure(name, options, device, peak)
        except Exception as error:  # The other cases can still be timed.
            failed, text = True, f"{type(error).__name__}: {error}".splitlines()[0]
            row = {"case": name, "preset": options.preset, "plan": options.plan, "error": text[:300]}
            print(f"{name}: {text}", file=sys.stderr, flush=True)
        rows.add(**row)
        print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.plan != "none":
        leave_ranks()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
