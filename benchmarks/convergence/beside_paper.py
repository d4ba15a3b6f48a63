"""Compare the published results of MaskAlign with those of the benchmark at a small size.

The numbers in `PUBLISHED` and `PAPER_*` are from the paper (arXiv 2606.08788): ImageNet at 256 px, FID of 50,000
images. Ours are Frechet distances in the features of a small classifier. The order of recipes can be compared, the
numbers cannot.
"""

import re
import statistics

from benchmarks.convergence.report import finals, spread

# (method, model, {iterations: FID without guidance}).
PUBLISHED = (
    ("MaskAlign", "XL/2", {"50K": 22.36, "110K": 6.34, "200K": 3.98, "400K": 2.84, "600K": 2.67, "1M": 2.38, "2.4M": 2.1}),  # noqa: E501
    ("REG", "XL/2", {"200K": 5.0, "400K": 3.4, "600K": 3.01, "1M": 2.7, "2.4M": 2.2}),
    ("REPA", "XL/2", {"150K": 13.6}),
    ("REPA + MaskAlign", "XL/2", {"150K": 10.8}),
    ("SiT", "B/2", {"400K": 33.0}),
    ("REPA", "B/2", {"400K": 24.4}),
    ("REG", "B/2", {"400K": 15.2}),
    ("MaskAlign", "B/2", {"400K": 14.8}),
)  # fmt: skip
ITERATIONS = ("50K", "110K", "150K", "200K", "400K", "600K", "1M", "2.4M")
GUIDED = (("MaskAlign", (1.82, 1.56, 1.35)), ("REG", (1.86, 1.59, 1.36)))  # after 80, 160 and 800 epochs
PAPER_MASK = {"0": 3.52, "0.25": 2.84, "0.5": 3.15, "0.75": 5.82}  # XL/2 at 400K
PAPER_LAYERS = {"1": 3.23, "2": 2.84, "3": 3.02}  # XL/2 at 400K
PAPER_PARTS = {"all": 2.67, "no mixing": 3.54, "no masking": 3.20, "neither": 3.01}  # XL/2 at 600K
MASK = {"0": "maskalign-mask0", "0.25": "maskalign", "0.5": "maskalign-mask0.5", "0.75": "maskalign-mask0.75"}
LAYERS = {"0": "maskalign-layers0", "1": "maskalign-layers1", "2": "maskalign", "3": "maskalign-layers3"}
PARTS = {"all": "maskalign", "no mixing": "maskalign-layers0", "no masking": "maskalign-mask0", "neither": "reg"}
DISTANCE = "frechet_cnn"
GAPS = ("gap", "gap_error", "gap_matched", "gap_matched_error")


def equal_step(rows):
    """The step at which all runs were measured, which is the number of steps of the slowest recipe."""
    return min(row["run_steps"] for row in rows)


def at_step(rows, metric, step):
    """{recipe: {seed: value}} of a metric at a step, for the recipes that were measured at it."""
    found = {}
    for row in rows:
        if row["metric"] == metric and row["time"] == "" and row["step"] == step:
            found.setdefault(row["recipe"], {})[row["seed"]] = row["value"]
    return found


def summary(rows, rates=None):
    """The rows of the table of the suites `rates`, `paper` and `ablations`: one dict per recipe.

    Args:
        rows: as returned by `report.read_rows`.
        rates: {recipe: learning rate}, or None for a table without this column.
    """
    step = equal_step(rows)
    ends = {name: finals(rows, name) for name in (DISTANCE, "kernel_cnn", "heat_ratio", *GAPS)}
    common, lines = at_step(rows, DISTANCE, step), []
    aligned = finals(rows, "full_align_loss")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        if recipe not in ends[DISTANCE]:
            continue
        own = [row for row in rows if row["recipe"] == recipe]
        line = {"recipe": recipe, "seeds": len(ends[DISTANCE][recipe])}
        line |= {"lr": rates[recipe]} if rates else {}
        line |= {"steps": own[0]["run_steps"], "PFLOP": f"{max(row['tflop'] for row in own) / 1000:.3g}"}
        line["Frechet"] = spread(ends[DISTANCE][recipe].values(), "{:.2f}")
        line["kernel"] = spread(ends["kernel_cnn"][recipe].values(), "{:.3f}")
        line[f"Frechet after {step} steps"] = spread(common[recipe].values(), "{:.2f}") if recipe in common else "-"
        if aligned:
            line["loss on all tokens"] = spread(aligned[recipe].values(), "{:.4f}") if recipe in aligned else "-"
            line["G_r"] = gap_text(ends, recipe)
            line["G_r, matched"] = gap_text(ends, recipe, "gap_matched")
            heat = ends["heat_ratio"].get(recipe)
            line["heat map's ratio"] = spread(heat.values(), "{:.1f}") if heat else "-"
        lines.append(line)
    return lines


def gap_text(ends, recipe, name="gap"):
    """A cell such as `+0.00121 ± 0.00041`: the mean of G_r over seeds and its standard error over images, or `-`."""
    if recipe not in ends[name]:
        return "-"
    value, error = gap_of(ends, recipe, name)
    return f"{value:+.5f} ± {error:.5f}"


def gap_of(ends, recipe, name="gap"):
    """(mean of G_r over seeds, standard error of that mean)."""
    errors = ends[f"{name}_error"][recipe].values()
    return statistics.fmean(ends[name][recipe].values()), sum(e * e for e in errors) ** 0.5 / len(errors)


def table(rows, rates=None):
    """The summary as aligned text."""
    lines = summary(rows, rates)
    if not lines:
        return "no run is finished yet"
    cells = [list(lines[0]), *[[str(value) for value in line.values()] for line in lines]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def verdict(better, worse):
    """Whether one recipe's distances are below those of another.

    Args:
        better, worse: {seed: value} of the recipes.

    Returns:
        "yes" or "no" if the ranges over seeds do not overlap, else "not distinguishable". With one seed each, "yes, one
        seed" or "no, one seed".
    """
    low, high = list(better.values()), list(worse.values())
    if len(low) == len(high) == 1:
        return "yes, one seed" if low[0] < high[0] else "no, one seed"
    if max(low) < min(high):
        return "yes"
    return "no" if max(high) < min(low) else "not distinguishable"


def comparison(paper, ablations=None, seconds=None):
    """The rows of the table of claims: (claim, paper, here, agreement).

    Args:
        paper: rows of the suite `paper`.
        ablations: rows of the suite `ablations`, or None.
        seconds: {label of a step: calibrated seconds} of the suite `paper`.
    """
    lines = []
    step = equal_step(paper)
    steps, ends = at_step(paper, DISTANCE, step), finals(paper, DISTANCE)
    for one, other, says in (
        ("reg", "repa", "FID 15.2 against 24.4 (B/2, 400K)"),
        ("maskalign", "reg", "FID 14.8 against 15.2 (B/2), 2.84 against 3.4 (XL/2, 400K)"),
        ("repa-maskalign", "repa", "FID 10.8 against 13.6 (XL/2, 150K)"),
    ):
        for values, when in ((steps, f"{step} steps each"), (ends, "equal time")):
            if one in values and other in values:
                here = f"{_mean(values[one]):.2f} against {_mean(values[other]):.2f}, {when}"
                sure = verdict(values[one], values[other])
                lines.append((f"`{one}` has a lower distance than `{other}`", says, here, sure))
    lines += _step_time(seconds)
    lines += _finding(paper)
    if ablations:
        lines += _ablations(ablations)
    return lines


def _mean(values):
    return statistics.fmean(values.values())


def _step_time(seconds):
    """The line on the time of a step; `seconds` has labels as written by `clock.calibrate`."""
    # A step's label contains the recipe that was timed first, which may have a learning rate, such as `reg@0.004`.
    by_step = {re.sub("@[^ ]*", "", label): value for label, value in (seconds or {}).items()}
    ours, base = (by_step.get(label) for label in ("maskalign 48/64", "reg 64/64"))
    if ours is None or base is None:
        return []
    says = "11.6% less (XL/2; 17.8% fewer FLOPs)"
    what = "a step of `maskalign` takes less time than one of `reg`"
    saved = 1 - ours / base
    here = f"{abs(saved):.1%} {'less' if saved > 0 else 'more'} (8 blocks and 2 mixing layers, 64 tokens)"
    return [(what, says, here, "yes" if saved > 0 else "no")]


def _finding(rows):
    """The lines on stability gap, alignment loss and heat map, which compare `maskalign` with `reg`."""
    ends = {name: finals(rows, name) for name in (*GAPS, "full_align_loss", "heat_ratio")}
    if any(name not in ends["gap"] for name in ("reg", "maskalign")):
        return []
    lines = []
    # The matched gap estimates the same value with less variance, see `maskalign.evaluation.gap`.
    gap = "gap_matched" if all(name in ends["gap_matched"] for name in ("reg", "maskalign")) else "gap"
    (ours, ours_error), (base, base_error) = (gap_of(ends, name, gap) for name in ("maskalign", "reg"))
    here = f"{gap_text(ends, 'maskalign', gap)} against {gap_text(ends, 'reg', gap)}"
    if base > 2 * base_error:
        here += f", which is {ours / base:.0%}"
    apart = abs(base - ours) > 2 * (ours_error**2 + base_error**2) ** 0.5
    sure = ("yes" if ours < base else "no") if apart else "not distinguishable"
    lines.append(
        ("the stability gap G_r of `maskalign` is smaller than that of `reg`", "13.8% of it (200K)", here, sure)
    )
    losses = ends["full_align_loss"]
    here = f"{_mean(losses['maskalign']):.4f} against {_mean(losses['reg']):.4f}"
    what = "the alignment loss of `maskalign` on all tokens is lower than that of `reg`"
    lines.append((what, "lower", here, verdict(losses["maskalign"], losses["reg"])))
    heat = ends["heat_ratio"]
    here = f"{_mean(heat['maskalign']):.1f} against {_mean(heat['reg']):.1f}"
    what = "masking distributes large alignment gradients more evenly over the positions"
    says = "the heat map's ratio is about 21 with all tokens aligned, and lower with masking"
    lines.append((what, says, here, verdict(heat["maskalign"], heat["reg"])))
    return lines


def _ablations(rows):
    ends, step = finals(rows, DISTANCE), equal_step(rows)
    common = at_step(rows, DISTANCE, step)
    lines = []
    for what, best, names, published, when in (
        ("mask ratio", "0.25", MASK, PAPER_MASK, "XL/2, 400K"),
        ("mixing layers", "2", LAYERS, PAPER_LAYERS, "XL/2, 400K"),
        ("parts", "all", PARTS, PAPER_PARTS, "XL/2, 600K"),
    ):
        for values, at in ((common, f"{step} steps each"), (ends, "equal time")):
            measured = {word: _mean(values[name]) for word, name in names.items() if name in values}
            if len(measured) < 2:
                continue
            says = ", ".join(f"{word}: {number:g}" for word, number in published.items()) + f" (FID, {when})"
            here = ", ".join(f"{word}: {number:.2f}" for word, number in measured.items()) + f" ({at})"
            found = min(measured, key=measured.get)
            sure = "yes, one seed" if found == best else f"no: {found} is best, one seed"
            lines.append((f"{what}: {best} is best", says, here, sure))
    return lines


def published_table():
    """(head, lines) of the table of the paper's results, as str."""
    head = ["method", "model", *ITERATIONS]
    lines = [
        [method, model, *(str(float(values[at])) if at in values else "" for at in ITERATIONS)]
        for method, model, values in PUBLISHED
    ]
    return head, lines


def guided_table():
    """(head, lines) of the table of the paper's results with guidance, as str."""
    return ["method", "80 epochs", "160 epochs", "800 epochs"], [
        [method, *(f"{value:g}" for value in values)] for method, values in GUIDED
    ]
