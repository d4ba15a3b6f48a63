"""All measurements on a GPU in the order of their importance, within a few minutes.

    python -m benchmarks.gpu [--minutes 8] [--out DIR] [--reference CHECKOUT]
    python -m benchmarks.gpu --device cpu --rehearse        # every part with tiny sizes, on a machine without a GPU

The parts are: the tests that need a GPU; the kernels at XL/2's sizes, each checked against float64 before it is timed;
the step times as CUDA graphs at B/2 (batch 128) and XL/2 (batch 64); ddp and fsdp on one rank; the public REPA or REG
code, if a checkout is given; a profile of one maskalign and one repa step. Each part is a process with its share of the
time and writes its CSV row by row, so that a part that fails or runs out of time does not affect the others.
gpu-parts.csv lists how each part ended, including those that did not fit into the time. `python -m benchmarks.report`
turns the files into tables.

A rehearsal runs the same code with tiny sizes. Its numbers are not results: its rows are marked, it writes to a
separate folder, and `benchmarks.report` rejects its files.
"""

import argparse
import sys
import time
from pathlib import Path

from benchmarks.gpu.schedule import Part, run_parts
from maskalign.errors import UsageError

RESULTS = Path(__file__).resolve().parent.parent / "results"
# The most important cases come first, because the time may run out within a part.
STEP_CASES = "repa,maskalign,maskalign-fast@0.5,reg,sit,maskalign-fused"
PLAN_CASES = "maskalign,repa"


def parts_of(options):
    """The list of `Part`, in order."""
    folder, python = Path(options.out), [sys.executable, "-m"]
    shared = ["--device", options.device, *["--rehearse"] * options.rehearse]
    small = ("SiT-S/8", 2)
    base, large = (small, small) if options.rehearse else (("SiT-B/2", 128), ("SiT-XL/2", 64))

    def part(name, module, file, *words, share=1.0, least=30.0):
        path = str(folder / file)
        words = [*python, module, "--out", path, *shared, *words]
        return Part(name, words, file, share, least * (0.1 if options.rehearse else 1))

    def steps(name, size, cases, *words, share, least=40.0):
        words = ["--preset", size[0], "--batch-size", str(size[1]), "--cases", cases, *words]
        return part(f"steps {name}", "benchmarks.gpu.steps", f"gpu-steps-{name}.csv", *words, share=share, least=least)

    parts = [
        part("tests", "benchmarks.gpu.device_tests", "gpu-tests.csv", share=1.2),
        part("kernels", "benchmarks.gpu.kernels", "gpu-kernels.csv", share=1.3, least=40.0),
        steps("b2", base, STEP_CASES, share=1.5),
        steps("xl2", large, "repa" if options.rehearse else STEP_CASES, share=1.5),
        steps("ddp", base, PLAN_CASES, "--plan", "ddp", share=0.5),
        steps("fsdp", base, PLAN_CASES, "--plan", "fsdp", share=0.5),
    ]
    if options.reference:
        checkout = ["--reference", options.reference]
        parts.append(steps("reference", base, "reference", *checkout, share=0.5))
    size = ["--preset", base[0], "--batch-size", str(base[1]), "--cases", "maskalign,repa"]
    parts.append(part("profile", "benchmarks.gpu.profile", "gpu-profile.csv", *size, share=0.8))
    return parts


def parse(argv):
    """Options of the command, checked.

    Raises:
        UsageError: options do not fit together, or the device does not exist.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together (default 8)")
    parser.add_argument("--out", help="folder of the CSVs; benchmarks/results, for a rehearsal runs/gpu-rehearsal")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cuda includes ROCm")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; the numbers are not results")
    parser.add_argument("--reference", metavar="CHECKOUT", help="root of a checkout of the public REPA or REG code")
    options = parser.parse_args(argv)
    if not options.minutes > 0:
        raise UsageError(f"--minutes: {options.minutes:g} is not above 0")
    if options.device == "cpu" and not options.rehearse:
        raise UsageError("--device cpu needs --rehearse, because the normal sizes are for a GPU")
    if options.reference and not Path(options.reference, "models", "sit.py").is_file():
        raise UsageError(
            f"--reference: {options.reference} has no models/sit.py; give the root of a REPA or REG checkout"
        )
    options.out = options.out or str(Path("runs/gpu-rehearsal") if options.rehearse else RESULTS)
    if options.rehearse and Path(options.out).resolve().is_relative_to(RESULTS):
        raise UsageError(f"--out: a rehearsal does not write to {options.out}, where results are kept")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise UsageError("--device cuda: no CUDA or ROCm device here; --device cpu --rehearse runs all parts, tiny")
    return options


def main(argv=None):
    options = parse(argv)
    started = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    always = {"rehearsal": int(options.rehearse), "started": started}
    outcomes = run_parts(parts_of(options), 60 * options.minutes, Path(options.out), **always)
    print(
        "\n".join(
            f"{o['part']:16} {o['status']:12} {o['seconds']:5.0f} s {o['rows']:4} rows  {o['note']}" for o in outcomes
        )
    )
    print(f"written to {options.out}" + "; this is a rehearsal, its numbers are not results" * options.rehearse)
    return 0 if all(outcome["status"] in ("done", "stopped") for outcome in outcomes) else 1
