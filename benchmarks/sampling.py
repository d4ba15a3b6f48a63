"""Speed of sampling in bf16 compared with float32, and how much the images differ.

    python -m benchmarks.sampling [--runs RUN ...] [--presets SiT-S/2,SiT-B/2] [--steps 4] [--rounds 7]

The same sampler (Euler, guidance 2, state in float64) draws the same images in four ways, which take turns in another
order every round: float32 (torch's default matmul precision), float32 with the matmul precision of training ("medium",
see `device.tune_host`), bf16 by autocast, and bf16 as in `maskalign sample`, where weights are cast once. Times are
medians over rounds, and ratios are medians of the ratios within a round. Both are given for wall time and CPU time; CPU
time depends little on other programs on the machine.

A trained run also draws a whole class sheet in each way, with the steps of its previews. The images are compared with
those of float32 as uint8. A preset has random weights (also where weights start at zero), so only its speed is
meaningful.
"""

import argparse
import csv
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from benchmarks.steps.clock import matmul_peak
from benchmarks.steps.report import machine
from maskalign.checkpoints import load_model
from maskalign.errors import UsageError
from maskalign.models import SiT
from maskalign.sampling.drawing import generate, sheet_labels
from maskalign.sampling.network import Network
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.settings import Sampling

WAYS = ("fp32 eager", "fp32 medium", "bf16 autocast", "bf16")
# Limits for images to count as equal: over all values, and for the image that differs most.
TOLERANCE = {"mean_levels": 0.5, "psnr_db": 45.0, "within_4_levels": 0.99}
COLUMNS = [
    "model", "way", "images", "images_per_second", "x_fp32", "x_fp32_p10", "x_fp32_p90", "x_fp32_cpu",
    "x_fp32_medium_cpu", "mean_levels", "max_levels", "psnr_db", "worst_psnr_db", "within_4_levels", "threads",
    "machine",
]  # fmt: skip


def preset_model(name, seed=0):
    """A preset on latents with random nonzero weights, because a new model predicts zero in every precision."""
    torch.manual_seed(seed)
    model = SiT.from_preset(name, input_size=32, in_channels=4, num_classes=1000, mixer="token_mlp")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    return model.eval().requires_grad_(False)


class Way:
    """One way to run a model."""

    def __init__(self, name, model):
        self.medium = name == "fp32 medium"
        self.network = Network(model, "fp32")
        if name == "bf16":
            self.network = Network(model, "bf16")
        elif name == "bf16 autocast":
            self.network.precision, self.network.autocast = "bf16", True

    def draw(self, labels, indices, settings):
        """(images, wall seconds, CPU seconds)."""
        torch.set_float32_matmul_precision("medium" if self.medium else "highest")
        wall, cpu = time.perf_counter(), time.process_time()
        images = generate(self.network, labels, settings, indices=indices)
        return images, time.perf_counter() - wall, time.process_time() - cpu


def time_ways(ways, labels, indices, settings, rounds, seed=0):
    """name -> list of (wall, CPU) seconds, one per round; each way is warmed up first."""
    order, seconds = list(ways), {name: [] for name in ways}
    for way in ways.values():
        way.draw(labels, indices, settings)
    shuffle = random.Random(seed)
    for _ in range(rounds):
        shuffle.shuffle(order)
        for name in order:
            seconds[name].append(ways[name].draw(labels, indices, settings)[1:])
    return seconds


def differences(images, truth):
    """Differences between two sets of uint8 images (n, H, W, C): dict of levels of 255 and decibels."""
    gap = (images.to(torch.float64) - truth.to(torch.float64)).abs()
    squares = gap.square().flatten(1).mean(dim=1)
    decibels = [float("inf") if s == 0 else float(10 * torch.log10(255**2 / s)) for s in (squares.mean(), *squares)]
    return {
        "mean_levels": float(gap.mean()),
        "max_levels": int(gap.max()),
        "psnr_db": decibels[0],
        "worst_psnr_db": min(decibels[1:]),
        "within_4_levels": float((gap <= 4).to(torch.float64).mean()),
    }


def is_equal(row):
    """True if the images are equal within TOLERANCE."""
    return (
        row["mean_levels"] <= TOLERANCE["mean_levels"]
        and row["psnr_db"] >= TOLERANCE["psnr_db"]
        and row["within_4_levels"] >= TOLERANCE["within_4_levels"]
    )


def quantile(values, share):
    return sorted(values)[round(share * (len(values) - 1))]


def rows_of(name, model, options, trained):
    """The CSV's rows of one model."""
    ways = {way: Way(way, model) for way in WAYS}
    classes = list(range(min(9, model.num_classes)))
    labels, indices = sheet_labels(classes, 8)
    count = min(options.images if trained else options.preset_images, len(labels))
    settings = Sampling(steps=options.steps, cfg_scale=2.0)
    seconds = time_ways(ways, labels[:count], indices[:count], settings, options.rounds)
    pictures = {}
    if trained:
        whole = Sampling(steps=options.picture_steps, cfg_scale=2.0)
        pictures = {way: to_uint8(ways[way].draw(labels, indices, whole)[0]) for way in WAYS}
    rows = []
    for way in WAYS:
        against = {
            key: [a[clock] / b[clock] for a, b in zip(seconds[base], seconds[way], strict=True)]
            for key, base, clock in (
                ("wall", "fp32 eager", 0), ("cpu", "fp32 eager", 1), ("medium_cpu", "fp32 medium", 1),
            )
        }  # fmt: skip
        row = {
            "model": name,
            "way": way,
            "images": count,
            "images_per_second": count / statistics.median(wall for wall, _ in seconds[way]),
            "x_fp32": statistics.median(against["wall"]),
            "x_fp32_p10": quantile(against["wall"], 0.1),
            "x_fp32_p90": quantile(against["wall"], 0.9),
            "x_fp32_cpu": statistics.median(against["cpu"]),
            "x_fp32_medium_cpu": statistics.median(against["medium_cpu"]),
            "threads": torch.get_num_threads(),
        }
        if trained and way != "fp32 eager":
            row |= differences(pictures[way], pictures["fp32 eager"])
        rows.append(row)
    return rows


def table(rows):
    """The rows as a Markdown table."""
    head = ["model", "precision", "images/s", "relative to fp32 eager", "by CPU time",
            "relative to fp32 medium, by CPU time",
            "pictures: mean difference in levels", "PSNR", "PSNR of the worst picture", "within 4 levels"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for row in rows:
        cells = [
            row["model"], row["way"], f"{row['images_per_second']:.2f}",
            f"{row['x_fp32']:.2f}x ({row['x_fp32_p10']:.2f}-{row['x_fp32_p90']:.2f})", f"{row['x_fp32_cpu']:.2f}x",
            f"{row['x_fp32_medium_cpu']:.2f}x",
        ]  # fmt: skip
        if "psnr_db" in row:
            cells += [f"{row['mean_levels']:.2f}", f"{row['psnr_db']:.1f} dB", f"{row['worst_psnr_db']:.1f} dB",
                      f"{row['within_4_levels']:.2%}"]  # fmt: skip
        else:
            cells += ["-"] * 4
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampling", description=__doc__.split("\n")[0])
    parser.add_argument("--runs", nargs="*", type=Path, default=[], help="trained runs, whose pictures are compared")
    parser.add_argument("--presets", default="SiT-S/2,SiT-B/2", help="models of random weights, with commas between")
    parser.add_argument(
        "--images", type=int, default=64, help="images per timed call of a run; 64 is sample's own batch"
    )
    parser.add_argument("--preset-images", type=int, default=8, help="images per timed call of a preset")
    parser.add_argument("--steps", type=int, default=4, help="steps of a timed call")
    parser.add_argument("--picture-steps", type=int, default=30, help="steps of the pictures that are compared")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sampling.csv")
    options = parser.parse_args(argv)
    if min(options.images, options.preset_images, options.steps, options.picture_steps, options.rounds) < 1:
        raise UsageError("--images, --preset-images, --steps, --picture-steps and --rounds must be at least 1")
    subjects = [(run.resolve().name, load_model(run), True) for run in options.runs]
    subjects += [(name, preset_model(name), False) for name in filter(None, options.presets.split(","))]
    rows = []
    for name, model, trained in subjects:
        rows += rows_of(name, model, options, trained)
        print(table(rows[-len(WAYS) :]), flush=True)
    torch.set_float32_matmul_precision("highest")
    device = torch.device("cpu")
    ran_on = machine(device, {precision: matmul_peak(device, precision) for precision in ("fp32", "bf16")})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        for row in rows:
            row = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
            writer.writerow({**row, "machine": ran_on})
    print(f"\n{ran_on}; {options.out}")
    unequal = [row for row in rows if "psnr_db" in row and not is_equal(row)]
    for row in unequal:
        print(f"{row['model']}, {row['way']}: images differ by more than {TOLERANCE}; ignore its speed")
    return 1 if unequal else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UsageError as error:
        print(f"benchmarks.sampling: error: {error}", file=sys.stderr)
        sys.exit(2)
