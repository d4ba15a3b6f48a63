"""Estimate the ImageNet recipes on a cluster, one row each, without running them.

    python -m benchmarks.plan [--world-size 512] [--device h100] [--plan hsdp] [--batch-per-rank 32]

Every run sees the number of images of its recipe (102,400,000) with the global batch of all ranks, so that GPU-hours
are comparable. This writes benchmarks/results/plan-RANKS-DEVICE.csv, from which benchmarks.report makes a table.
"""

import argparse
import csv
import sys
from pathlib import Path

from maskalign.config import load_config, parse_config
from maskalign.errors import UsageError
from maskalign.planning.devices import load_device
from maskalign.planning.options import Options

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs" / "imagenet256"
SIZES, RECIPES = ("b2", "l2", "xl2"), ("repa", "reg", "maskalign", "maskalign-fast")


def plan_recipe(path, options, plan, batch_per_rank):
    """One row: the result of `estimate.plan_run` for a recipe with `batch_per_rank` images on every rank."""
    from maskalign.planning.estimate import plan_run

    own, whole = load_config(path), batch_per_rank * options.world_size
    steps = max(1, round(own.training.max_steps * own.training.batch_size / whole))
    words = ["--parallel.plan", plan, "--training.batch_size", str(whole), "--training.max_steps", str(steps)]
    # A data set that does not exist: the plan must not depend on the content of datasets/.
    estimate = plan_run(parse_config(["--config", str(path), "--data.path", "not-there", *words]), options)
    peaks = [peak for _, peak in sorted(estimate.peaks.items(), key=lambda item: item[0].kept)]
    row = estimate.asked
    return {
        "model": own.model.preset,
        "recipe": path.stem,
        "device": options.device.name,
        "plan": plan,
        "ranks": options.world_size,
        "batch_per_rank": batch_per_rank,
        "global_batch": whole,
        "images": steps * whole,
        "efficiency": options.efficiency,
        "parameters": sum(estimate.parameters.values()),
        "gflops_per_image": sum(phase["share"] * phase["step"] for phase in estimate.phases) / 1e9,
        "memory_gib": row["memory_gib"],
        "kept_least_gib": peaks[0].kept / 2**30,
        "kept_most_gib": peaks[-1].kept / 2**30,
        "largest_batch": estimate.largest,
        "step_ms": row["step_ms"],
        "link_ms": row["link_ms"],
        "waiting_ms": row["waiting_ms"],
        "sent_mib": row["sent_mib"],
        "images_per_second": row["images_per_second"],
        "mfu": row["mfu"],
        "gpu_hours": row["gpu_hours"],
        "energy_kwh": row["energy_kwh"],
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.split("\n")[0])
    parser.add_argument("--world-size", type=int, default=512)
    parser.add_argument("--device", default="h100", help="a name or a .yaml file, as for maskalign plan")
    parser.add_argument("--plan", default="hsdp", choices=("ddp", "fsdp", "hsdp"))
    parser.add_argument("--batch-per-rank", type=int, default=32)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    given = parser.parse_args(argv)
    options = Options(given.world_size, load_device(given.device))
    rows = []
    for size in given.sizes:
        for recipe in RECIPES:
            rows.append(plan_recipe(CONFIGS / size / f"{recipe}.yaml", options, given.plan, given.batch_per_rank))
            print(f"{size} {recipe}: {rows[-1]['memory_gib']:.1f} GiB, {rows[-1]['images_per_second']:,.0f} images/s")
    path = given.out / f"plan-{given.world_size}-{Path(given.device).stem.lower()}.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})
    print(path)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"benchmarks.plan: error: {error}", file=sys.stderr)
        sys.exit(2)
