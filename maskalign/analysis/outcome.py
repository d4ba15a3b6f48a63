"""outcome.md: the conditions of an analysis and its results, as tables."""

from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

from maskalign.analysis.agreement import PAIRS
from maskalign.analysis.measure import FULL, MASKED, MODES, SUBSET
from maskalign.analysis.pictures import ratio_text, summary_cases
from maskalign.analysis.stability import fixed_ranking_overlap
from maskalign.analysis.tables import CHECKPOINTS, DRAWS, MEAN_MAP, RUNS, SINGLE, WAYS


@dataclass
class MeasuredRun:
    """A run (a series of checkpoints) in `Conditions`.

    Attributes:
        settings: the settings that affect the measurements, as text.
        kept: number of tokens in a subset.
        class_token: True if the model has a class token.
        steps: steps of the checkpoints, in order; None for an unknown step.
    """

    settings: str
    kept: int
    class_token: bool
    steps: List[Optional[int]]


@dataclass
class Conditions:
    """The conditions of an analysis.

    Attributes:
        data: name of the data set.
        images: number of images.
        times, draws, top, seed: as in `AnalysisSettings`.
        weights: the weights that were measured (averaged or not), as text.
        tokens: number of patch tokens of an image.
        teachers: names of the teachers.
        group_size: number of images per gradient of the trunk.
        runs: `MeasuredRun` by name, in the given order.
    """

    data: str
    images: int
    times: Tuple[float, ...]
    draws: int
    top: float
    seed: int
    weights: str
    tokens: int
    teachers: List[str]
    group_size: int
    runs: Dict[str, MeasuredRun] = field(default_factory=dict)


def write_outcome(tables, conditions):
    """The report as Markdown.

    Args:
        tables: dict with lists of rows `shares`, `gap`, `positions`, `stability`, `concentration`, `agreement`.
        conditions: `Conditions`.

    Returns:
        str.
    """
    lines = ["# Alignment gradients: outcome", "", *_conditions_text(conditions), ""]
    lines += _papers(tables, conditions)
    cases = summary_cases(tables["stability"])
    for run in conditions.runs:
        lines += [f"## {run}", ""]
        lines += _positions(run, tables, conditions)
        lines += _stability(run, cases, tables["stability"], conditions)
        lines += _training(run, tables["stability"])
        lines += _draws(run, cases, conditions)
        lines += _trunk(run, tables["agreement"], conditions)
    return "\n".join(lines + _between_runs(tables["stability"]))


def markdown(head, rows):
    """Lines of a Markdown table, with an empty line after it."""
    return [f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows]] + [""]


def beyond(value, limit):
    """`yes` if a number is above the limit of chance. The tolerance is for shares that are equal up to rounding."""
    return "yes" if value > limit + 1e-6 else "no"


def _step(step):
    return "unknown" if step in (None, "") else str(step)


def _conditions_text(conditions):
    times = ", ".join(f"{time:g}" for time in conditions.times)
    lines = [
        f"Measured on {conditions.images} images of {conditions.data}, at t = {times} (1 is noise), with "
        f"{conditions.draws} draws of noise and subset each; weights: {conditions.weights}; {conditions.tokens} "
        f"tokens, of which the top {conditions.top:.0%} are the largest; seed {conditions.seed}. Teachers: "
        f"{', '.join(conditions.teachers)}.",
        "",
        "The gradient is that of the sum over aligned tokens of -cos(projector(h), z) with respect to the token's "
        "features h at the tap, before the projector; labels are kept. Chance is given by random permutations, and for "
        "mean maps also by turning one map on the torus, which keeps neighbors together; the wider interval counts.",
        "",
    ]
    rows = [
        [name, ", ".join(map(_step, run.steps)), f"{run.settings}, subset of {run.kept} tokens"]
        for name, run in conditions.runs.items()
    ]
    return lines + markdown(["run", "checkpoints (steps)", "settings"], rows)[:-1]


def _papers(tables, conditions):
    """The two measurements of the paper by run and checkpoint, and the comparison of the runs with the first one."""
    gaps = {(row["run"], row["step"]): row for row in tables["gap"] if row["time"] == ""}
    shares = [row for row in tables["shares"] if row["time"] == ""]
    first = shares[0]
    lines = [
        "## The paper's measurements",
        "",
        "*Shares*, all tokens aligned: the share of images (at all times and draws) in which a position's gradient is "
        f"among the top {conditions.top:.0%} of the patches; chance gives {first['chance']:.3f} everywhere. "
        f"A smallest share of zero counts as one of {first['observations']} observations, and the ratio is then a "
        "lower bound. The ratio by chance comes from permuting the positions of every image.",
        "",
    ]
    head = ["run", "step", "largest share", "smallest share", "ratio (95 %)", "ratio by chance (95 %)", "beyond chance"]
    if gaps:
        one = next(iter(gaps.values()))
        lines += [
            f"*Stability gap* G_r, mask ratio {one['mask_ratio']:g}: the alignment loss where all blocks see "
            f"{_seen(conditions)}{one['kept']} of {one['patches']} patches, dropped after the mixing layers, minus the "
            f"loss on all tokens, for the same images, times and noise. ± is one standard error over {one['images']} "
            f"images; the spread is the standard deviation of the mean gap over {one['subsets']} draws of the subsets. "
            "The *matched* gap estimates the same number with less spread: it compares the subset's tokens with the "
            "same tokens where the model sees all of them. A projector that needs the whole token grid has no "
            "stability gap.",
            "",
        ]
        head += ["loss on all tokens", "G_r", "spread over subsets", "G_r, matched"]
    rows = []
    for row in shares:
        cells = [
            row["run"], _step(row["step"]), f"{row['largest']:.3f}", f"{row['smallest']:.3f}",
            f"{ratio_text(row)} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})",
            f"{row['chance_ratio']:.1f} (up to {row['chance_high']:.1f})", beyond(row["ratio"], row["chance_high"]),
        ]  # fmt: skip
        gap = gaps.get((row["run"], row["step"]))
        if gap is not None:
            cells += [
                f"{gap['full_loss']:+.4f}", _with_error(gap, "gap", "standard_error"),
                f"{gap['subset_deviation']:.5f}", _with_error(gap, "matched_gap", "matched_error"),
            ]  # fmt: skip
        elif gaps:
            cells += ["", "not defined", "", ""]
        rows.append(cells)
    lines += markdown(head, rows)
    if not gaps:
        lines += ["There is no stability gap: the projectors need the whole token grid.", ""]
    return lines + _beside_first(shares, gaps)


def _with_error(gap, value, error):
    return f"{gap[value]:+.5f} ± {gap[error]:.5f}"


def _seen(conditions):
    """The words about the class token in the description of a subset."""
    have_one = [run.class_token for run in conditions.runs.values()]
    if not any(have_one):
        return ""
    return "the class token and " if all(have_one) else "the class token (where there is one) and "


def _beside_first(shares, gaps):
    """A table that compares the other runs with the first one, at the last step that both have."""
    runs = list(dict.fromkeys(row["run"] for row in shares))
    by_step = {(row["run"], row["step"]): row for row in shares}
    rows = []
    for run in runs[1:]:
        steps = {name: [row["step"] for row in shares if row["run"] == name] for name in (runs[0], run)}
        common = [step for step in steps[run] if step is not None and step in steps[runs[0]]]
        at = [common[-1]] * 2 if common else [steps[name][-1] for name in (runs[0], run)]
        a, b = (by_step[name, step] for name, step in zip((runs[0], run), at, strict=True))
        apart = "lower" if b["ratio_high"] < a["ratio_low"] else "higher" if b["ratio_low"] > a["ratio_high"] else "no"
        cells = [run, f"{_step(at[1])}, {_step(at[0])}", ratio_text(b), ratio_text(a), apart]
        a, b = (gaps.get((name, step)) for name, step in zip((runs[0], run), at, strict=True))
        known = a is not None and b is not None
        cells += [f"{b['full_loss']:+.4f}", f"{a['full_loss']:+.4f}", _share(a, b)] if known else ["", "", ""]
        rows.append(cells)
    if not rows:
        return []
    lines = [
        f"Other runs beside {runs[0]}. Two ratios are apart where their intervals do not overlap; the share of the gap "
        "is given where the first run's matched gap is more than two standard errors above zero.",
        "",
    ]
    head = ["run", f"its step, {runs[0]}'s", "ratio", f"ratio of {runs[0]}", "apart"]
    head += ["loss on all tokens", f"loss of {runs[0]}", f"matched gap over that of {runs[0]}"]
    return lines + markdown(head, rows)


def _share(a, b):
    """The matched gap `b` as a share of `a`, with its standard error; a dash if `a` is not clearly above zero."""
    if a["matched_gap"] <= 2 * a["matched_error"]:
        return "-"
    share = b["matched_gap"] / a["matched_gap"]
    errors = b["matched_error"] / a["matched_gap"], share * a["matched_error"] / a["matched_gap"]
    return f"{share:.1%} ± {(errors[0] ** 2 + errors[1] ** 2) ** 0.5:.1%}"


def _last(rows, run):
    rows = [row for row in rows if row["run"] == run]
    return [row for row in rows if row["step"] == rows[-1]["step"]] if rows else []


def _positions(run, tables, conditions):
    """How the norms differ by position at the last checkpoint, for each way to align."""
    rows = []
    for row in _last(tables["concentration"], run):
        maps = [r for r in _last(tables["positions"], run) if r["mode"] == row["mode"] and r["time"] == ""]
        norms = [r["norm"] for r in maps]
        mean = sum(norms) / len(norms)
        spread = (sum((norm - mean) ** 2 for norm in norms) / len(norms)) ** 0.5 / mean
        rows.append(
            [
                MODES[row["mode"]], f"{spread:.0%}", f"{min(norms) / mean:.2f} to {max(norms) / mean:.2f}",
                f"{row['taken']:.1%}", f"{row['taken_low']:.1%} to {row['taken_high']:.1%}",
                beyond(row["taken"], row["taken_high"]), f"{row['most_frequent']:.1%}",
            ]
        )  # fmt: skip
    head = [
        "way to align", "deviation of the mean norm by position", "range over mean",
        f"share of the top places at the {conditions.top:.0%} of positions most often there", "by chance",
        "beyond chance", "most frequent position",
    ]  # fmt: skip
    return markdown(head, rows)


def _stability(run, cases, rows, conditions):
    lines = [
        f"Overlap of the sets of the top {conditions.top:.0%}, and Spearman's rank correlation of all tokens, at the "
        "last checkpoint; in brackets the mean of chance and the limit that it reaches:",
        "",
    ]
    head = ["way to align", "level", "between", "overlap", "beyond chance", "correlation", "beyond chance"]
    found = [
        [
            mode, level, between,
            f"{case['overlap']:.3f} ({case['overlap_chance']:.3f}, up to {case['overlap_limit']:.3f})",
            beyond(case["overlap"], case["overlap_limit"]),
            f"{case['spearman']:+.2f} (0, up to {case['spearman_limit']:.2f})",
            beyond(case["spearman"], case["spearman_limit"]),
        ]
        for mode in MODES
        for (level, between), case in cases.get((run, mode), {}).items()
    ]  # fmt: skip
    lines += markdown(head, found)
    ways = [
        [
            row["a"], row["b"], f"{row['spearman']:+.2f}",
            f"{row['overlap']:.2f} ({row['overlap_chance']:.3f}, up to "
            f"{max(row['overlap_high'], row['overlap_turned_high']):.2f})",
        ]
        for row in _last(rows, run) if row["between"] == WAYS
    ]  # fmt: skip
    if ways:
        lines += ["Mean maps of two ways to align:", "", *markdown(["one", "other", "correlation", "overlap"], ways)]
    return lines


def _training(run, rows):
    """How the top sets of single images change from each checkpoint to the next, and from the first to the last."""
    rows = [row for row in rows if (row["run"], row["mode"], row["between"]) == (run, FULL, CHECKPOINTS)]
    pairs = {(row["a"], row["b"]): row for row in rows if row["level"] == SINGLE}
    if not pairs:
        return []
    steps = list(dict.fromkeys(step for pair in pairs for step in pair))
    shown = list(zip(steps, steps[1:], strict=False)) + ([(steps[0], steps[-1])] if len(steps) > 2 else [])
    found = [[_step(a), _step(b), *_overlap(pairs[a, b])] for a, b in shown]
    title = "All tokens aligned, overlap of an image's top set between checkpoints:"
    return [title, "", *markdown(["from step", "to step", "overlap", "beyond chance"], found)]


def _overlap(row):
    """Two cells: an overlap with the values by chance, and whether it is above them."""
    chance = f"({row['overlap_chance']:.2f}, up to {row['overlap_high']:.2f})"
    return [f"{row['overlap']:.2f} {chance}", beyond(row["overlap"], row["overlap_high"])]


def _draws(run, cases, conditions):
    """The effect of drawing subsets: the overlap of an image's top set between consecutive draws."""
    full = cases[run, FULL].get((SINGLE, DRAWS))
    if full is None:
        return []
    rows = [[MODES[FULL], f"{full['overlap']:.2f} ({full['overlap_chance']:.2f})", "1.00", f"{full['spearman']:+.2f}"]]
    for mode in (MASKED, SUBSET):
        case = cases.get((run, mode), {}).get((SINGLE, DRAWS))
        if case is not None:
            fixed = fixed_ranking_overlap(conditions.tokens, conditions.runs[run].kept, conditions.top)
            overlap = f"{case['overlap']:.2f} ({case['overlap_chance']:.2f})"
            rows.append([MODES[mode], overlap, f"{fixed:.2f}", f"{case['spearman']:+.2f}"])
    title = (
        "Overlap of an image's top set from one draw to the next, in brackets by chance; and of a ranking that never "
    )
    title += "changes, of which only the kept tokens are seen:"
    head = ["way to align", "overlap", "of a fixed ranking", "correlation of tokens in both draws"]
    return [title, "", *markdown(head, rows)]


def _trunk(run, rows, conditions):
    lines = [f"Cosine of the trunk's alignment gradients, {conditions.group_size} images for each gradient:", ""]
    places = list(dict.fromkeys(row["place"] for row in _last(rows, run)))
    places = ["all", *[place for place in places if place != "all"]]
    found = []
    for pair in PAIRS:
        values = {row["place"]: row for row in _last(rows, run) if row["pair"] == pair}
        if values:
            found.append([PAIRS[pair], *(_cosine(values.get(place)) for place in places)])
    return lines + markdown(["between", *places], found)


def _cosine(row):
    if row is None:
        return ""
    error = row["standard_error"]
    return f"{row['cosine']:.3f}" + ("" if error == "" else f" ± {error:.3f}")


def _between_runs(rows):
    """How similar two runs' gradients are on the same images, times and noise, with all tokens aligned."""
    means = {(r["a"], r["b"]): r for r in rows if r["between"] == RUNS and r["level"] == MEAN_MAP}
    found = [
        [row["a"], row["b"], *_overlap(row), f"{means[row['a'], row['b']]['spearman']:+.2f}"]
        for row in rows
        if row["between"] == RUNS and row["level"] == SINGLE
    ]
    if not found:
        return []
    head = ["run", "other run", "overlap of an image's top set", "beyond chance", "correlation of the mean maps"]
    return ["## Between runs", "", "All tokens aligned, the last checkpoints.", "", *markdown(head, found)]
