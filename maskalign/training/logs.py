"""Write and read the metrics.csv of a run, and draw curves from it. run_log.py uses this during training."""

import csv
import io
import resource
import sys
from pathlib import Path

import torch

from maskalign.runtime.files import replacing, write_atomically

COLUMNS = [
    "step",
    "time",
    "loss",
    "velocity_loss",
    "align_loss",
    "class_velocity_loss",
    "grad_norm",
    "lr",
    "keep_ratio",
    "align_weight",
    "images_per_second",
    "tflops",
    "mfu",
    "peak_memory_mib",
    "data_wait",
    "comm_seconds",
    "epoch",
    "skipped_steps",
    "bad_samples",
]

# Columns that are written with all digits, because tests and restarts compare them. Losses are float32.
EXACT = ("loss", "velocity_loss", "align_loss", "class_velocity_loss", "grad_norm", "time")


def peak_memory_mib(device):
    """Peak memory of the device's allocator, or of this process on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


class MetricsFile:
    """metrics.csv of a run: one row per logged interval. Losses and norm are means over the interval, times in seconds.

    A resumed run first removes the rows after its checkpoint, so each step occurs only once.

    Args:
        path: path of the file.
        step: the step from which the run continues.
    """

    def __init__(self, path, step):
        text = up_to(path, step)
        if not Path(path).exists() or Path(path).read_bytes() != text.encode():
            write_atomically(path, text.encode())  # atomic, so a full disk does not destroy the file
        # Unbuffered, so that closing the file does not try again to write data that could not be written.
        self.file = open(path, "ab", buffering=0)

    def write(self, row):
        formatted = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
        formatted |= {key: f"{row[key]:.9g}" for key in EXACT}
        line = _csv_lines([formatted[key] for key in COLUMNS]).encode()
        while line:
            line = line[self.file.write(line) :]

    def close(self):
        self.file.close()


def up_to(path, step):
    """The text of a metrics.csv with `COLUMNS` and the rows up to a step, without damaged lines."""
    lines = [COLUMNS]
    if Path(path).exists():
        with open(path, newline="", encoding="utf-8", errors="replace") as file:
            for row in csv.DictReader(line.replace("\0", "") for line in file):
                if _numbers(row) is not None and _numbers(row)["step"] <= step:
                    lines.append([row.get(key, 0) for key in COLUMNS])
    return _csv_lines(*lines)


def _csv_lines(*lines):
    text = io.StringIO()
    csv.writer(text).writerows(lines)
    return text.getvalue()


def _numbers(row):
    """A row of a metrics.csv as numbers; None if it is truncated or damaged."""
    try:
        numbers = {key: float(row[key]) if key in row else 0.0 for key in COLUMNS}
        return numbers | {key: int(numbers[key]) for key in ("step", "epoch", "skipped_steps", "bad_samples")}
    except (TypeError, ValueError, KeyError, OverflowError):
        return None


def read_metrics(path):
    """The rows of a metrics.csv as dicts of numbers, without an incomplete last line. Missing columns are 0."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        rows = [_numbers(row) for row in csv.DictReader(line.replace("\0", "") for line in file)]
    return [row for row in rows if row is not None]


def draw_curves(rows, path, title, evaluations=()):
    """Plot losses, alignment cosine, gradient norm, and speed against steps into a PNG.

    Args:
        rows: as returned by `read_metrics`.
        path: path of the PNG.
        title: title of the figure.
        evaluations: rows of evaluation.csv. Held-out losses are drawn in the panels of the training losses, and
            distances in
            additional panels below.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    steps = [row["step"] for row in rows]
    panels = [
        ("velocity loss", [row["velocity_loss"] for row in rows], "#1f5fa8"),
        ("alignment: mean cosine", [-row["align_loss"] for row in rows], "#2a8c55"),
        ("gradient norm (log)", [row["grad_norm"] for row in rows], "#a85a1f"),
        ("images per second", [row["images_per_second"] for row in rows], "#6b4ba3"),
    ]
    held_out = ["held_out_velocity_loss", "held_out_cosine", None, None]
    distances = [key for row in evaluations[-1:] for key in row if key.startswith(("frechet[", "kernel["))][:2]
    colors = ["#1f5fa8", "#6b4ba3"]
    panels += [(key, None, color) for key, color in zip(distances, colors, strict=False)]
    lines = 2 if len(panels) == 4 else 3
    figure, axes = plt.subplots(lines, 2, figsize=(10, 3.1 * lines), sharex=True, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, values, color) in zip(axes.flat, panels, strict=False):
        if values is None:
            points = [(row["step"], row[name]) for row in evaluations if name in row]
            axis.plot(*zip(*points, strict=True), "o-", color=color, linewidth=1.6, markersize=3.5)
        else:
            axis.plot(steps, values, color=color, linewidth=1.6)
        name = name.replace("frechet[", "Frechet distance (").replace("kernel[", "kernel distance (").replace("]", ")")
        axis.set_title(name, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis, key in zip(axes.flat, held_out, strict=False):
        points = [(row["step"], row[key]) for row in evaluations if key in row]
        if points:
            style = dict(color="#b03060", linewidth=1.2, markersize=3.5, label="evaluation, EMA")
            axis.plot(*zip(*points, strict=True), "o--", **style)
            axis.legend(fontsize=8, frameon=False)
    axes[1, 0].set_yscale("log")
    axes[1, 0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1, 0].yaxis.set_major_formatter("{x:g}")  # 0.2, not a power of ten times 2
    axes[1, 0].yaxis.set_minor_formatter(NullFormatter())
    # The keep ratio is drawn behind the loss, because a change of it changes the tokens that the loss is over.
    keep = axes[0, 0].twinx()
    keep.fill_between(steps, [row["keep_ratio"] for row in rows], step="pre", color="gray", alpha=0.12, linewidth=0)
    keep.set_ylim(0, 1.02)
    keep.set_ylabel("keep ratio (gray)", fontsize=8)
    keep.spines[["top"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.suptitle(title, fontsize=11)
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=110)
    finally:
        plt.close(figure)
