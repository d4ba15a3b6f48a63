"""The output of `benchmarks.steps`: an aligned table, a CSV, a plot."""

import csv
import platform
import re
from pathlib import Path

import torch

COLUMNS = (
    ("case", "case", "{}"), ("tokens", "tokens", "{}"), ("images_per_second", "images/s", "{:.2f}"),
    ("step_ms", "ms", "{:.0f}"), ("spread", "p10-p90", "{}"), ("x_repa", "x REPA", "{:.2f}"),
    ("ratio_spread", "p10-p90", "{}"), ("x_reference", "x ref", "{:.2f}"), ("time_of_reg", "of REG", "{:.3f}"),
    ("passes_of_reg", "fwd+bwd", "{:.3f}"), ("mixer_cost", "mixer", "{:+.1%}"),
    ("gflops_per_image", "GFLOP", "{:.1f}"), ("share_of_matmul_peak", "of peak", "{:.0%}"),
    ("share_of_peak_fwd_bwd", "in passes", "{:.0%}"),
    ("saved_mib", "saved MiB", "{:.0f}"), ("saved_x_repa", "x REPA", "{:.2f}"), ("peak_mib", "peak MiB", "{:.0f}"),
    ("data_ms", "data", "{:.0f}"), ("teacher_ms", "teacher", "{:.0f}"), ("forward_ms", "fwd", "{:.0f}"),
    ("backward_ms", "bwd", "{:.0f}"), ("optimizer_ms", "optim", "{:.0f}"), ("ema_ms", "EMA", "{:.0f}"),
)  # fmt: skip


def table(rows):
    """The rows as aligned text."""
    lines = [[title for _, title, _ in COLUMNS]]
    for row in rows:
        row = {**row, "spread": f"{row['step_ms_p10']:.0f}-{row['step_ms_p90']:.0f}", "ratio_spread": None}
        if row["x_repa"] is not None:
            row["ratio_spread"] = f"{row['x_repa_p10']:.2f}-{row['x_repa_p90']:.2f}"
        lines.append(["-" if row[key] is None else form.format(row[key]) for key, _, form in COLUMNS])
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def machine(device, peaks):
    """One line about the machine: its name, threads, torch version and matmul peaks (FLOP/s by precision)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        threads = torch.get_num_threads()
        name = f"{names[0] if names else platform.processor()}, {threads} thread{'s' * (threads > 1)}"
    best = ", ".join(f"{precision} matmul {peak / 1e9:.0f} GFLOP/s" for precision, peak in peaks.items())
    return f"{name}; torch {torch.__version__}; {best}"


def write(rows, options, ran_on):
    """Write the CSV and the PNG in the folder options.out; returns their paths. `ran_on` is of `machine`."""
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"steps-{options.preset.replace('/', '-')}-{options.precision}-b{options.batch_size}"
    stem += "" if rows[0]["device"] == "cpu" else f"-{rows[0]['device']}"
    if options.reference and options.reference_precision != options.precision:
        stem += f"-reference-{options.reference_precision}"
    stem += "-beside-reg" * any(row["case"].startswith("reference-reg") for row in rows)
    stem += "-passes" * (not options.update)
    stem += "-compiled" * options.compile + "-shards" * (options.data == "shards")
    stem += "" if options.teacher == "cached" else f"-{re.sub('[^a-z0-9]+', '-', options.teacher.lower())}"
    stem = folder / stem
    with open(f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "machine"])
        writer.writeheader()
        writer.writerows(
            {
                key: f"{value:.6g}" if isinstance(value, float) else value
                for key, value in {**row, "machine": ran_on}.items()
            }
            for row in rows
        )
    draw(rows, ran_on, f"{stem}.png")
    return f"{stem}.csv", f"{stem}.png"


def draw(rows, ran_on, path, metadata=None):
    """Draw images per second and saved bytes as bars, from new rows or rows that were read from a CSV."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    first, names = rows[0], [row["case"] for row in rows][::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 1.4 + 0.45 * len(rows)), sharey=True, layout="constrained")
    colors = ["#999999" if name.startswith("reference") else "#2a6f97" for name in names]
    rates = [row["images_per_second"] for row in rows][::-1]
    low = [row["batch_size"] * 1000 / row["step_ms_p90"] for row in rows][::-1]
    high = [row["batch_size"] * 1000 / row["step_ms_p10"] for row in rows][::-1]
    errors = [
        [max(0, r - a) for r, a in zip(rates, low, strict=True)],
        [max(0, b - r) for r, b in zip(rates, high, strict=True)],
    ]
    left.barh(names, rates, xerr=errors, color=colors, ecolor="#333333", capsize=3)
    left.set_xlabel("images per second (bar: median, whiskers: 10th to 90th percentile)")
    for y, row in enumerate(rows[::-1]):
        if row["x_repa"]:
            left.text(row["images_per_second"] / 2, y, f"{row['x_repa']:.2f}x", color="white", ha="center", va="center")
    right.barh(names, [row["saved_mib"] for row in rows][::-1], color=colors)
    right.set_xlabel("activations saved for the backward, MiB")
    what = f"{first['preset']}, batch {first['batch_size']:.0f}, {first['precision']}, training step; x: over our REPA"
    figure.suptitle(f"{what}\n{ran_on}", fontsize=9)
    figure.savefig(path, dpi=120, metadata=metadata)
    plt.close(figure)
