"""The output of `benchmarks.convergence`: a table, and plots of quality against time and against FLOPs."""

import csv
import statistics
import textwrap
from collections import defaultdict

COLUMNS = (
    "data", "recipe", "seed", "share", "run_steps", "step", "seconds", "tflop", "metric", "time", "value",
)  # fmt: skip
NUMBERS = {"seed": int, "share": float, "run_steps": int, "step": int, "seconds": float, "tflop": float, "value": float}
BETTER_LOW = {
    "velocity_loss": True, "raw_velocity_loss": True, "cosine": False, "frechet": True, "kernel": True,
    "frechet_cnn": True, "kernel_cnn": True,
}  # fmt: skip
# The metrics that are comparable between recipes with and without a class token.
COMMON = ("frechet_cnn", "kernel_cnn")
FORMS = {metric: "{:.4f}" if "loss" in metric else "{:.3g}" for metric in BETTER_LOW}
# Fixed colors of the main recipes in all plots.
KNOWN = {
    "repa": "black", "reg": "tab:gray", "maskalign": "tab:blue", "maskalign-fast": "tab:orange",
    "maskalign-attention": "tab:red",
}  # fmt: skip
TITLES = {
    "velocity_loss": "held-out velocity loss, all tokens",
    "raw_velocity_loss": "the same of the weights themselves, not averaged",
    "cosine": "held-out alignment cosine",
    "frechet": "Frechet distance of EMA samples",
    "kernel": "kernel distance of EMA samples",
    "frechet_cnn": "Frechet distance of EMA samples, small classifier",
    "kernel_cnn": "kernel distance of EMA samples, small classifier",
}


def write_rows(rows, path):
    """Write the long CSV: a row per run, step, metric and diffusion time (an empty `time` is the mean over times)."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{row[key]:.6g}" if isinstance(row[key], float) else row[key] for key in COLUMNS})


def read_rows(path):
    """Read the rows of the long CSV, with numbers converted; an empty `seconds` (no calibration) becomes None."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for key, kind in NUMBERS.items():
            row[key] = None if row[key] == "" else kind(row[key])
    return rows


def curves(rows, metric):
    """{(recipe, seed, share of the budget): [(seconds, tflop, step, value)]} of a metric, sorted by step."""
    found = defaultdict(list)
    for row in rows:
        if row["metric"] == metric and row["time"] == "":
            point = (row["seconds"], row["tflop"], row["step"], row["value"])
            found[row["recipe"], row["seed"], row["share"]].append(point)
    return {key: sorted(points, key=lambda point: point[2]) for key, points in found.items()}


def shown_metrics(rows):
    """The metrics of a plot: those of COMMON if they were measured, else all that were measured."""
    measured = [metric for metric in BETTER_LOW if finals(rows, metric)]
    return [metric for metric in measured if metric in COMMON] or measured


def has_curves(rows, metrics=tuple(BETTER_LOW)):
    """Whether any run was measured in one of the metrics before its end too."""
    return any(len(points) > 1 for metric in metrics for points in curves(rows, metric).values())


def finals(rows, metric, share=1.0):
    """{recipe: {seed: value at the end of its run with this share of the budget}} of a metric."""
    found = defaultdict(dict)
    for (recipe, seed, of), points in curves(rows, metric).items():
        if of == share:
            found[recipe][seed] = points[-1][-1]
    return dict(found)


def time_to(points, target, low=True, axis=0):
    """The time at which a curve first reaches a target, interpolated linearly, or None if it does not reach it.

    Args:
        points: a value of `curves`.
        target: the value to reach.
        low: whether lower values are better.
        axis: the unit of the result: 0 for seconds, 1 for TFLOP, 2 for steps.
    """
    before = None
    for point in points:
        value = point[-1]
        if (value <= target) if low else (value >= target):
            if before is None:
                return point[axis]
            share = (before[-1] - target) / (before[-1] - value)
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


def ratios_to_repa(rows, metric, axis=0):
    """{recipe: [time of each seed]} at which a recipe reaches REPA's final value of a metric.

    The target is the mean of REPA's final values over its seeds. A time is relative to the mean length of REPA's runs;
    it is the least over the runs of a seed, or None for a seed that does not reach the target within the budget.
    """
    runs, repa = curves(rows, metric), finals(rows, metric).get("repa")
    if not repa:
        return {}
    target = statistics.fmean(repa.values())
    length = statistics.fmean(points[-1][axis] for key, points in runs.items() if key[0] == "repa" and key[2] == 1)
    found = defaultdict(dict)
    for (recipe, seed, _), points in runs.items():
        reached = time_to(points, target, BETTER_LOW[metric], axis)
        known = found[recipe].get(seed)
        ratio = None if reached is None else reached / length
        found[recipe][seed] = ratio if known is None else known if ratio is None else min(known, ratio)
    return {recipe: [by_seed[seed] for seed in sorted(by_seed)] for recipe, by_seed in found.items()}


def spread(values, form):
    """A cell `mean [lowest, highest]` over seeds, or only the value of one seed."""
    values = list(values)
    text = form.format(statistics.fmean(values))
    return text if len(values) == 1 else f"{text} [{form.format(min(values))}, {form.format(max(values))}]"


def spread_of_ratios(values):
    """A cell with the median and range of times; `>1` for a seed that does not reach the target."""
    if not values:
        return "-"
    ordered = sorted(values, key=lambda value: float("inf") if value is None else value)
    words = [">1" if value is None else f"{value:.2f}" for value in ordered]
    middle = words[len(words) // 2]
    return middle if len(words) == 1 else f"{middle} [{words[0]}, {words[-1]}]"


def apart(values, repa):
    """Whether all values are better (lower) than all of REPA's, so that the ranges over seeds do not overlap."""
    return len(values) > 1 and len(repa) > 1 and max(values) < min(repa)


def summary(rows):
    """The rows of the table: one dict per recipe and share of the budget, with recipes in the order of `rows`.

    The time at which REPA's quality is reached is omitted for a metric that was measured only at the end of runs.
    """
    shares = sorted({row["share"] for row in rows}, reverse=True)
    ends = {(metric, share): finals(rows, metric, share) for metric in BETTER_LOW for share in shares}
    timed = all(row["seconds"] is not None for row in rows)
    axis = 0 if timed else 2
    times = {"time to REPA's loss": "velocity_loss", "time to REPA's Frechet": "frechet"}
    ratios = {head: ratios_to_repa(rows, of, axis) for head, of in times.items() if has_curves(rows, (of,))}
    lines = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        for share in shares:
            if recipe not in ends["velocity_loss", share]:
                continue
            own = [row for row in rows if (row["recipe"], row["share"]) == (recipe, share)]
            last = max(own, key=lambda row: row["step"])
            name = recipe if share == 1 else f"{recipe}, {share:g} of the budget"
            line = {"recipe": name, "seeds": len(ends["velocity_loss", share][recipe]), "steps": last["run_steps"]}
            line["PFLOP"] = f"{last['tflop'] / 1000:.3g}"
            for metric, form in FORMS.items():
                if not any(ends[metric, of] for of in shares):
                    continue
                values = ends[metric, share].get(recipe)
                line[metric] = spread(values.values(), form) if values else "-"
                repa = ends[metric, 1.0].get("repa") if 1.0 in shares else None
                if values and repa and BETTER_LOW[metric] and apart(values.values(), repa.values()):
                    line[metric] += " *"
            for head, found in ratios.items():
                line[head] = spread_of_ratios(found.get(recipe)) if share == 1 else ""
            lines.append(line)
    return lines


def table(rows):
    """The summary as aligned text; a star means that every seed is better than all of REPA's."""
    lines = summary(rows)
    if not lines:
        return "no run is finished yet"
    cells = [list(lines[0]), *[[str(value) for value in line.values()] for line in lines]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def draw(rows, title, path, metadata=None):
    """Draw the plot of a suite with `draw_curves`, or with `draw_ends` if runs were measured only at their end.

    Args:
        rows: as returned by `read_rows`.
        title: its long lines are wrapped.
        path: path of the PNG.
        metadata: dict of text entries of the PNG.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = (draw_curves if has_curves(rows, shown_metrics(rows)) else draw_ends)(rows)
    figure.suptitle("\n".join(textwrap.fill(line, 150) for line in title.splitlines()), fontsize=8)
    figure.savefig(path, dpi=110, metadata=metadata)
    plt.close(figure)


def draw_ends(rows):
    """Final values: a panel per metric, a line per recipe, a dot per seed, and a dashed line at REPA's mean."""
    from matplotlib import pyplot as plt

    metrics = shown_metrics(rows)
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    size = (2.2 * len(metrics) + 2, 0.22 * len(recipes) + 1.3)
    figure, panels = plt.subplots(1, len(metrics), figsize=size, squeeze=False, sharey=True, layout="constrained")
    for panel, metric in zip(panels[0], metrics, strict=True):
        ends = finals(rows, metric)
        if "repa" in ends:
            panel.axvline(statistics.fmean(ends["repa"].values()), color="black", linewidth=0.8, linestyle="--")
        for number, recipe in enumerate(recipes):
            values = list(ends.get(recipe, {}).values())
            panel.plot(values, [number] * len(values), "o", color=KNOWN.get(recipe, "tab:blue"), markersize=4)
        panel.set_title(textwrap.fill(TITLES[metric], 26), fontsize=8, loc="left")
        panel.set_xlabel("lower is better" if BETTER_LOW[metric] else "higher is better", fontsize=7)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_yticks(range(len(recipes)), recipes)
    panels[0, 0].invert_yaxis()
    return figure


def draw_curves(rows):
    """Quality against time and against FLOPs: a row of panels per metric, a color per recipe, a band over seeds.

    The final values of all seeds are dots. Runs with a part of the budget have thin lines.
    """
    from matplotlib import pyplot as plt

    metrics = shown_metrics(rows)
    timed = all(row["seconds"] is not None for row in rows)
    axes_of = [(0, "seconds of training (calibrated)") if timed else (2, "steps"), (1, "TFLOP of training")]
    size = (11, 3.1 * len(metrics))
    figure, panels = plt.subplots(len(metrics), 2, figsize=size, squeeze=False, layout="constrained")
    colors = colors_of(dict.fromkeys(row["recipe"] for row in rows))
    for line, metric in zip(panels, metrics, strict=True):
        runs = curves(rows, metric)
        for panel, (axis, unit) in zip(line, axes_of, strict=True):
            for recipe, share in dict.fromkeys((recipe, share) for recipe, _, share in runs):
                own = [points for (name, _, of), points in runs.items() if (name, of) == (recipe, share)]
                draw_runs(panel, own, axis, colors[recipe], recipe, share)
            panel.set_xlabel(unit, fontsize=8)
            panel.set_title(TITLES[metric], fontsize=9, loc="left")
            panel.grid(alpha=0.25, which="both")
            panel.spines[["top", "right"]].set_visible(False)
            if BETTER_LOW[metric]:
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter("{x:g}")
                panel.tick_params(axis="y", which="both", labelsize=8)
    panels[0, 0].legend(fontsize=6, ncols=2)
    return figure


def colors_of(recipes):
    """{recipe: color}, with the colors of `KNOWN` and different ones for the other recipes."""
    from matplotlib import pyplot as plt
    from matplotlib.colors import same_color

    taken, pairs = KNOWN.values(), plt.get_cmap("tab20").colors  # pairs of a color and a lighter one
    free = [color for color in pairs[::2] + pairs[1::2] if not any(same_color(color, one) for one in taken)]
    return {recipe: KNOWN.get(recipe, free[number % len(free)]) for number, recipe in enumerate(recipes)}


def draw_runs(panel, runs, axis, color, recipe, share):
    """Draw one recipe and share of the budget: the mean over seeds, their range, and their final values as dots."""
    columns = list(zip(*runs, strict=True))
    x = [statistics.fmean(point[axis] for point in points) for points in columns]
    values = [[point[-1] for point in points] for points in columns]
    whole = share == 1
    label = recipe if whole else f"{recipe}, planned for {share:g}"
    panel.plot(x, [statistics.fmean(of) for of in values], color=color, linewidth=1.4 if whole else 0.6, label=label)
    panel.plot([run[-1][axis] for run in runs], [run[-1][-1] for run in runs], "o", color=color, markersize=3)
    if len(runs) > 1 and whole:
        panel.fill_between(x, [min(of) for of in values], [max(of) for of in values], color=color, alpha=0.15, lw=0)
