"""Throughput and memory of a training step: MaskAlign, the baselines, and the public REPA or REG code, side by side.

    python -m benchmarks.steps --preset SiT-B/2 --batch-size 8 --precision bf16 --recipes repa,reg,maskalign \\
        [--keep-ratios 0.5,0.25] [--reference CHECKOUT] [--teacher online:dinov2-b] [--data shards] [--no-compile]

A step is forward, backward, clip, AdamW and EMA on random latents 4x32x32, 1000 classes, teacher features and class
tokens of width 768. By default these are in memory. --data shards reads them through the loader, and --teacher
online:NAME runs an encoder in every step. `sit`, `repa`, `reg`, `maskalign` and `repa-maskalign` have the keep ratios
of their YAML files, the other recipes those of --keep-ratios. --reference takes a checkout of REPA or REG and
recognizes which one it is. On a CPU, the time of forward and backward is measured in the same steps. --passes-only
omits the optimizer. --one-at-a-time rebuilds the cases in every round, for models that do not fit into memory together.

Our cases run with compiled blocks, as with `training.compile`, if the machine has a compiler. The public code runs as
published, in a separate process. All cases take turns, in another order every round. Times are medians over rounds,
ratios are medians of the ratios within a round, and the spread is the 10th to 90th percentile. Some columns are from
separate passes: the parts of a step, the bytes that autograd saves, and the peak memory of a case alone in a process.
If other programs use the machine too, `--threads 1 --clock cpu` measures CPU time instead of wall time.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.steps.cases import OWN_RATIO, RECIPES, OurCase
from benchmarks.steps.clock import CLOCKS, matmul_peak
from benchmarks.steps.data import LATENT, write_shards
from benchmarks.steps.reference import FILES, SETTINGS, Reference, ReferenceCase
from benchmarks.steps.report import machine, table, write
from maskalign.config import Config
from maskalign.config.presets import preset_sizes
from maskalign.errors import UsageError
from maskalign.models.flops import step_flops
from maskalign.runtime.device import tune_host
from maskalign.training.parallel import make_placement


def case_names(options):
    """(recipe, keep ratio or None) of every case; the reference comes last."""
    names = []
    for recipe in options.recipes:
        ratios = [None] if recipe in OWN_RATIO else options.keep_ratios
        names += [(recipe, keep) for keep in ratios]
    if options.reference:
        names.append(("reference", None))
    return names


def make_case(recipe, keep, options):
    if recipe == "reference":
        return Reference(options)
    return OurCase(
        recipe, options.preset, keep, options.batch_size, options.precision, options.device, options.compile,
        options.data, options.teacher, options.shards, options.update,
    )  # fmt: skip


def higher_peaks(peaks, device, clock):
    """Measure the matmul peaks (FLOP/s by precision) again, and return the higher value for each precision.

    A single measurement can be too low if other programs use the processor, or while it warms up.
    """
    return {precision: max(peak, matmul_peak(device, precision, clock)) for precision, peak in peaks.items()}


def warm_up(case, options, device):
    """Run the steps before the timed ones; ends with an error if the loss is not finite."""
    for _ in range(options.warmup):
        _, loss, _ = case.step_seconds(device, options.clock)
    if not math.isfinite(loss):
        raise SystemExit(f"{case.name}: the loss is not finite; no speed is reported")


def measure(names, options, device, peaks):
    """Measure the seconds of every step, in rounds in which the cases take turns.

    Args:
        names: (recipe, keep ratio) of the cases.
        peaks: FLOP/s by precision; they are measured again in every round.

    Returns:
        (described, seconds, peaks): a dict of `describe_case` per case; dict from case name to a list with one entry
        per round, (seconds of a step, seconds of forward and backward or None); the highest peaks.
    """
    cases = {}
    if not options.one_at_a_time:
        for name in names:
            cases[name] = make_case(*name, options)
            print(f"warming up {cases[name].name}", file=sys.stderr, flush=True)
            warm_up(cases[name], options, device)
    described, seconds = {}, {}
    order, shuffle = list(names), random.Random(0)
    for number in range(options.rounds):
        shuffle.shuffle(order)
        for name in order:
            case = cases.get(name) or make_case(*name, options)
            if options.one_at_a_time:
                warm_up(case, options, device)
                described[name] = described.get(name) or describe_case(case, options, device)
            gc.collect()
            steps = [case.step_seconds(device, options.clock) for _ in range(options.steps_per_turn)]
            passes = [step[2] for step in steps if step[2] is not None]
            whole = statistics.median(step[0] for step in steps)
            seconds.setdefault(case.name, []).append((whole, statistics.median(passes) if passes else None))
            if options.one_at_a_time:
                case.close()
                del case
                gc.collect()
        peaks = higher_peaks(peaks, device, options.clock)
        print(f"\rround {number + 1}/{options.rounds}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    for name, case in cases.items():
        described[name] = describe_case(case, options, device)
        peaks = higher_peaks(peaks, device, options.clock)
        case.close()
    return [described[name] for name in names], seconds, peaks


def describe_case(case, options, device):
    """The properties of a case other than its times, as a dict."""
    return {
        "name": case.name,
        "recipe": case.recipe,
        "keep": case.keep,
        "aligned": case.aligned,
        "tokens": f"{case.kept}/{case.model.num_tokens}",
        "flops": step_flops(case.model, case.kept),
        "saved": case.saved_bytes(),
        "parts": case.split(device, options.split_steps, options.clock),
    }


def peak_memory_alone(case, options):
    """Peak MiB of a case in a separate process, minus the memory of Python and torch before the model is built.

    Args:
        case: dict from `describe_case`.
    """
    of = "reference" if case["recipe"] == "reference" else case["name"]
    words = [sys.executable, "-m", "benchmarks.steps", "--peak-of", of]
    for name in ("precision", "threads", *SETTINGS):
        value = getattr(options, name)
        if value is not None and name != "update":
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += ["--compile" if options.compile else "--no-compile"] + ["--passes-only"] * (not options.update)
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        print(f"peak memory of {case['name']}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])["peak_mib"]


def peak_rss_mib():
    """The largest resident size of this process in MiB; getrusage would include that of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def print_peak(options, device):
    """The child of `peak_memory_alone`."""
    recipe, _, keep = options.peak_of.partition("@")
    if recipe != "reference":
        tune_host(device)
    matmul_peak(device, options.precision, size=256, tries=1)  # the libraries' own buffers must not count
    before = peak_rss_mib()
    if recipe == "reference":
        case = ReferenceCase(*(getattr(options, name) for name in SETTINGS))
    else:
        case = make_case(recipe, float(keep) if keep else None, options)
    for _ in range(3):
        case.step()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) / 2**20
    else:
        peak = peak_rss_mib() - before
    print(json.dumps({"peak_mib": peak}))


def rows_of(cases, seconds, peaks, options, device):
    """One dict per case, in the columns of the CSV.

    Args:
        cases, seconds, peaks: from `measure`.
    """

    def ratios(key, over, of, place=0):
        """Median, 10th and 90th percentile of the ratios within a round, under `key`, `key`_p10 and `key`_p90.

        place: 0 for whole steps, 1 for forward and backward.
        """
        pairs = [(a[place], b[place]) for a, b in zip(seconds.get(over, []), seconds.get(of, []), strict=False)]
        found = sorted(a / b for a, b in pairs if a is not None and b is not None)
        if not found:
            return dict.fromkeys((key, f"{key}_p10", f"{key}_p90"))
        return {key: statistics.median(found), f"{key}_p10": quantile(found, 0.1), f"{key}_p90": quantile(found, 0.9)}

    reference = next((case["name"] for case in cases if case["recipe"] == "reference"), None)
    mixing = {case["keep"]: case["name"] for case in cases if case["recipe"] == "maskalign-fast-no-mixer"}
    saved = {case["name"]: case["saved"] for case in cases}
    rows = []
    for case in cases:
        name = case["name"]
        times = sorted(whole for whole, _ in seconds[name])
        median = statistics.median(times)
        precision = options.reference_precision if case["recipe"] == "reference" else options.precision
        flops = case["flops"]
        rate = options.batch_size * flops / median
        without = mixing.get(case["keep"]) if case["recipe"] == "maskalign-fast" else None
        parts = case["parts"]
        alone = [passes for _, passes in seconds[name] if passes is not None]
        # On a GPU, where a step is one graph, these are the times of the split, launched kernel by kernel.
        passes = statistics.median(alone) if alone else (parts["forward"] + parts["backward"]) / 1000
        row = {
            "case": name,
            "preset": options.preset,
            "precision": precision,
            "batch_size": options.batch_size,
            "tokens": case["tokens"],
            "device": device.type,
            "clock": options.clock,
            "compiled": options.compile and case["recipe"] != "reference",
            "data": options.data,
            "teacher": options.teacher if case["aligned"] else "none",
            "images_per_second": options.batch_size / median,
            "step_ms": 1000 * median,
            "step_ms_p10": 1000 * quantile(times, 0.1),
            "step_ms_p90": 1000 * quantile(times, 0.9),
            "passes_ms": 1000 * passes,
            **ratios("x_repa", "repa", name),
            **ratios("x_reference", reference, name),
            **ratios("time_of_reg", name, "reg"),
            **ratios("passes_of_reg", name, "reg", place=1),
            "mixer_cost": None if without is None else ratios("x", name, without)["x"] - 1,
            "gflops_per_image": flops / 1e9,
            "share_of_matmul_peak": rate / peaks[precision],
            "share_of_peak_fwd_bwd": options.batch_size * flops / passes / peaks[precision],
            "saved_mib": saved[name] / 2**20,
            "saved_x_repa": saved[name] / saved["repa"] if "repa" in saved else None,
            "peak_mib": peak_memory_alone(case, options) if options.peak else None,
        }
        row |= {f"{part}_ms": value for part, value in parts.items()}
        rows.append(row)
    return rows


def quantile(ordered, share):
    return ordered[round(share * (len(ordered) - 1))]


def check_memory(options, names):
    """End with an error if the cases would not fit into memory, before the measurement starts (CPU only)."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    available = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), None)
    if available is None:
        return  # not Linux, so the free memory is not known
    with torch.device("meta"):
        from maskalign.models import SiT

        count = sum(p.numel() for p in SiT.from_preset(options.preset).parameters())
    cases = 1 if options.one_at_a_time else len(names)
    # Weights, gradients, two moments, EMA, and bf16 copies of two of these; or only weights and gradients.
    needed = cases * count * (22 if options.update else 8)
    if needed > 0.9 * available:
        raise UsageError(
            f"{cases} cases of {options.preset} take about {needed / 2**30:.0f} GiB, {available / 2**30:.0f} are free; "
            "run fewer --recipes or --keep-ratios at once, --one-at-a-time, or --passes-only"
        )


def can_compile(device):
    """True if torch.compile works for the device."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    compilers = (os.environ.get("CXX"), "g++", "clang++")
    return any(shutil.which(name) for name in compilers if name)


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="SiT-S/2", help="SiT-{S,B,L,XL}/{2,4,8}")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--keep-ratios", default="0.5,0.25", help="keep ratios of the recipes that drop tokens")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="fp32")
    parser.add_argument("--recipes", default="repa,reg,maskalign,maskalign-fast", help=f"of {', '.join(RECIPES)}")
    parser.add_argument("--reference", help="root of a local checkout of the public REPA or REG code (needs timm)")
    parser.add_argument("--reference-precision", choices=("bf16", "fp32"), help="by default the value of --precision")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2, help="steps of every case before the first round")
    parser.add_argument("--steps-per-turn", type=int, default=1, help="steps of a case in a round; the median is used")
    parser.add_argument("--one-at-a-time", action="store_true", help="build and free a case in every round")
    parser.add_argument(
        "--passes-only", dest="update", action="store_false", help="forward and backward alone, without the optimizer"
    )
    parser.add_argument("--split-steps", type=int, default=3, help="steps over which the parts of a step are timed")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the blocks of our cases; by default if there is a C++ compiler (CPU) or Triton (GPU)",
    )
    parser.add_argument("--teacher", default="cached", help="cached, or online:NAME to run that encoder in every step")
    parser.add_argument("--data", choices=("memory", "shards"), default="memory", help="where batches come from")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: CPU time, needs one thread")
    parser.add_argument("--out", default="benchmarks/results", help="folder of the CSV and PNG")
    parser.add_argument("--no-peak", dest="peak", action="store_false", help="skip the peak memory, which is slow")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--shards", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.recipes = [name.strip() for name in options.recipes.split(",")]
    unknown = [name for name in options.recipes if name not in RECIPES]
    if unknown:
        parser.error(f"there is no recipe {unknown[0]!r}; choose from {', '.join(RECIPES)}")
    try:
        options.keep_ratios = [float(ratio) for ratio in options.keep_ratios.split(",")]
    except ValueError:
        parser.error(f"--keep-ratios: {options.keep_ratios!r} is not a list of numbers")
    if options.teacher != "cached" and not options.teacher.startswith("online:"):
        parser.error(f"--teacher: {options.teacher!r} is neither cached nor online:NAME")
    if options.clock == "cpu" and options.threads != 1:
        parser.error("--clock cpu needs --threads 1, because threads that wait for each other would be counted")
    if min(options.rounds, options.warmup, options.steps_per_turn) < 1:
        parser.error("--rounds, --warmup and --steps-per-turn must be at least 1")
    missing = [
        name for name in FILES if options.reference and not os.path.isfile(os.path.join(options.reference, name))
    ]
    if missing:
        parser.error(f"--reference: {options.reference} has no {missing[0]}; give a checkout of the public REPA or REG")
    options.reference_precision = options.reference_precision or options.precision
    return options


def main(argv=None):
    options = parse(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    training = Config().training
    training.device, training.precision = options.device, options.precision
    device = make_placement(training).device
    if options.compile is None:
        options.compile = can_compile(device)
    if options.peak_of:
        print_peak(options, device)
        return
    tune_host(device)
    names = case_names(options)
    if device.type == "cpu":
        check_memory(options, names)
    with tempfile.TemporaryDirectory() as folder:
        if options.data == "shards":
            patch = preset_sizes(options.preset)["patch_size"]
            options.shards = write_shards(folder, (LATENT[1] // patch,) * 2, max(64, 8 * options.batch_size))
        run(names, options, device)


def run(names, options, device):
    """Measure the cases, write the files and print the table."""
    precisions = dict.fromkeys((options.precision, options.reference_precision))
    cases, seconds, peaks = measure(names, options, device, dict.fromkeys(precisions, 0.0))
    rows = rows_of(cases, seconds, peaks, options, device)
    ran_on = machine(device, peaks)
    paths = write(rows, options, ran_on)
    print(f"{options.preset}, batch {options.batch_size}, {options.precision}, {options.rounds} rounds; {ran_on}")
    print("written:", *paths)
    print(table(rows))
