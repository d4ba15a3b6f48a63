"""Heat maps and curves of an analysis, drawn from the rows of its tables."""

import numpy as np

from maskalign.analysis.measure import FULL, MODES
from maskalign.analysis.tables import CHECKPOINTS, DRAWS, HALVES, MEAN_MAP, SINGLE, TIMES


def _figure(*shape, **settings):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(*shape, squeeze=False, **settings)


def _save(figure, path):
    from matplotlib import pyplot

    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _grid(rows, key):
    """A (rows, columns) array from the table rows of one map."""
    shape = max(row["row"] for row in rows) + 1, max(row["column"] for row in rows) + 1
    out = np.full(shape, np.nan)
    for row in rows:
        out[row["row"], row["column"]] = row[key]
    return out


def draw_maps(positions, stem, top, title):
    """Draw the heat maps of one checkpoint, a line per way to align: mean over times, each time, and top frequency.

    Norms are divided by the mean of their map, so that maps with different sizes of gradients can be compared.

    Args:
        positions: rows of positions.csv of one checkpoint.
        stem: path of the PNG.
        top: share of the patches that counts as the top.
        title: beginning of the figure's title.
    """
    modes = list(dict.fromkeys(row["mode"] for row in positions))
    times = list(dict.fromkeys(row["time"] for row in positions))
    panels = {}
    for mode in modes:
        for time in times:
            rows = [row for row in positions if row["mode"] == mode and row["time"] == time]
            norm = _grid(rows, "norm")
            panels[mode, time] = norm / np.nanmean(norm)
        panels[mode, "top"] = _grid([r for r in positions if r["mode"] == mode and r["time"] == ""], "top_frequency")
    columns = [*times, "top"]
    spread = max(np.nanmax(np.abs(panels[mode, time] - 1)) for mode in modes for time in times)
    figure, axes = _figure(
        len(modes), len(columns), figsize=(1.75 * len(columns) + 1.2, 2.1 * len(modes) + 0.7), layout="constrained"
    )
    frequent = max(np.nanmax(panels[mode, "top"]) for mode in modes)
    for number, mode in enumerate(modes):
        line = axes[number]
        for axis, column in zip(line, columns, strict=True):
            if column == "top":
                scale = dict(cmap="viridis", vmin=0, vmax=frequent)
                name = f"share of images with it\namong the top {top:.0%}"
            else:
                scale = dict(cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread)
                name = "mean norm,\nall times" if column == "" else f"t = {column:g}"
            image = axis.imshow(panels[mode, column], **scale)
            axis.set(xticks=[], yticks=[])
            if number == 0:
                axis.set_title(name, fontsize=8)
            if column in (times[-1], "top"):
                figure.colorbar(image, ax=axis, shrink=0.75).ax.tick_params(labelsize=7)
        line[0].set_ylabel(MODES[mode].replace(", ", ",\n"), fontsize=8)
    figure.suptitle(f"{title}: gradient norm by position, relative to the mean", fontsize=9)
    return _save(figure, stem)


SHARE_SCALE = 0.8  # the paper's heat maps go from 0 to this share


def draw_shares(positions, shares, path, top):
    """Draw the paper's heat maps, all tokens aligned: the share of images in which a position is among the top.

    There is a row for each run, with maps by time at its last checkpoint, then a map over all times at each of its
    checkpoints. All maps have the paper's scale, from 0 to 0.8, on which the share by chance is marked. The text below
    a map is the ratio of its largest share to its smallest.

    Args:
        positions, shares: rows of positions.csv and shares.csv.
        path: path of the PNG.
        top: share of the patches that counts as the top.
    """
    maps = {}
    for row in positions:
        if row["mode"] == FULL:
            maps.setdefault((row["run"], row["step"], row["time"]), []).append(row)
    ends = {(row["run"], row["step"], row["time"]): row for row in shares}
    steps = {}
    for run, step, _ in ends:
        steps.setdefault(run, dict.fromkeys([]))[step] = None
    times = list(dict.fromkeys(time for _, _, time in ends))
    by_step = max(len(members) for members in steps.values())
    by_step = by_step if by_step > 1 else 0  # the maps by time already show a single checkpoint
    columns = len(times) + by_step
    widths = [1.0] * len(times) + ([0.35] + [1.0] * by_step if by_step else [])
    figure, axes = _figure(
        len(steps), len(widths), figsize=(1.35 * columns + 1.6, 1.75 * len(steps) + 1.1), layout="constrained",
        gridspec_kw=dict(width_ratios=widths),
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    image = None
    for line, (run, members) in zip(axes, steps.items(), strict=True):
        known = list(members)
        panels = [(time, known[-1], "all times" if time == "" else f"t = {time:g}") for time in times]
        panels += [None] + [("", step, _at(step)) for step in known] if by_step else []
        for axis, panel in zip(line, panels, strict=False):
            if panel is None:
                continue
            time, step, title = panel
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            key = run, step, time
            image = axis.imshow(_grid(maps[key], "top_frequency"), cmap="viridis", vmin=0, vmax=SHARE_SCALE)
            axis.set_title(title, fontsize=8)
            axis.set_xlabel(ratio_text(ends[key]), fontsize=8)
        line[0].set_ylabel(f"{run}\n{_at(known[-1])}".strip(), fontsize=8)
    bar = figure.colorbar(image, ax=axes, shrink=0.9, extend="max", fraction=0.03)
    chance = next(iter(ends.values()))["chance"]
    bar.ax.axhline(chance, color="white", lw=1.5)
    marks = [mark for mark in (0, 0.2, 0.4, 0.6, SHARE_SCALE) if abs(mark - chance) > 0.04]
    bar.set_ticks([*marks, chance], labels=[*(f"{mark:g}" for mark in marks), f"chance {chance:.2g}"])
    bar.ax.tick_params(labelsize=8)
    words = f"share of images in which a position's gradient is among the top {top:.0%}, all tokens aligned"
    course = "; by time at the last checkpoint, then by checkpoint" if by_step else ""
    figure.suptitle(f"{words}{course}\n(below: largest share over smallest)", fontsize=9)
    return _save(figure, path)


def ratio_text(row):
    """The ratio of a row of shares.csv: `21`, or `at least 300` where the smallest share is zero."""
    digits = f"{row['ratio']:.1f}" if row["ratio"] < 10 else f"{row['ratio']:.0f}"
    return f"at least {digits}" if row["at_least"] else digits


def _at(step):
    return "" if step is None else f"step {step}"


def draw_gaps(gaps, path):
    """Draw the full-token alignment loss and the stability gap by checkpoint, and the gap by time at the last one.

    Args:
        gaps: rows of gap.csv.
        path: path of the PNG.
    """
    figure, axes = _figure(1, 3, figsize=(13, 3.8), layout="constrained")
    losses, course, by_time = axes[0]
    last = _last_steps(gaps)
    ratio = gaps[0]["mask_ratio"]
    for number, (run, step) in enumerate(last.items()):
        own = [row for row in gaps if row["run"] == run and row["time"] == ""]
        # The step of a file is not known, so its single point is drawn at 0.
        steps = [0 if row["step"] is None else row["step"] for row in own]
        style = dict(marker="o", ms=3.5, lw=1.4, color=f"C{number}", label=run)
        losses.plot(steps, [row["full_loss"] for row in own], **style)
        values, errors = ([row[key] for row in own] for key in ("matched_gap", "matched_error"))
        course.errorbar(steps, values, yerr=errors, capsize=3, **style)
        course.plot(steps, [row["gap"] for row in own], "x", ms=5, color=f"C{number}")
        own = [row for row in gaps if (row["run"], row["step"]) == (run, step) and row["time"] != ""]
        values, errors = ([row[key] for row in own] for key in ("matched_gap", "matched_error"))
        by_time.errorbar([row["time"] for row in own], values, yerr=errors, capsize=3, **style)
    losses.set(title="alignment loss on all tokens", xlabel="step", ylabel="-mean cosine")
    course.set(
        title=f"stability gap, mask ratio {ratio:g}", xlabel="step", ylabel="loss on subset - loss on all tokens"
    )
    by_time.set(title="the gap by time, last checkpoint", xlabel="time t (1 is noise)")
    for axis in (course, by_time):
        axis.axhline(0, color="k", lw=0.6, ls=":")
    for axis in axes[0]:
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=7)
    figure.suptitle("lines: matched gap, with one standard error over images; crosses: plain gap", fontsize=8)
    return _save(figure, path)


def draw_series(positions, path, title):
    """Draw the full-token mean maps of a run's checkpoints side by side on one scale, relative to each map's mean."""
    steps = list(dict.fromkeys(row["step"] for row in positions))
    maps = []
    for step in steps:
        chosen = [r for r in positions if r["step"] == step and r["mode"] == FULL and r["time"] == ""]
        norm = _grid(chosen, "norm")
        maps.append(norm / np.nanmean(norm))
    spread = max(np.nanmax(np.abs(norm - 1)) for norm in maps)
    figure, axes = _figure(1, len(maps), figsize=(1.6 * len(maps) + 1.2, 2.3), layout="constrained")
    for axis, step, norm in zip(axes[0], steps, maps, strict=True):
        image = axis.imshow(norm, cmap="RdBu_r", vmin=1 - spread, vmax=1 + spread)
        axis.set(xticks=[], yticks=[])
        axis.set_title("" if step is None else f"step {step}", fontsize=8)
    figure.colorbar(image, ax=axes[0, -1], shrink=0.75).ax.tick_params(labelsize=7)
    figure.suptitle(f"{title}: gradient norm by position over training, all tokens aligned", fontsize=9)
    return _save(figure, path)


def draw_curves(positions, stability, agreement, path):
    """Draw the norm by time, the overlap of the top sets and chance, the overlap over training, and the agreement."""
    figure, axes = _figure(2, 2, figsize=(12, 9), layout="constrained")
    _norm_by_time(axes[0, 0], positions)
    _overlaps(axes[0, 1], stability)
    _course(axes[1, 0], stability)
    _agreements(axes[1, 1], agreement)
    return _save(figure, path)


def _last_steps(rows):
    """dict run -> its last step in the rows."""
    return {row["run"]: row["step"] for row in rows}


def _norm_by_time(axis, positions):
    last = _last_steps(positions)
    for run, step in last.items():
        for mode in MODES:
            rows = [r for r in positions if (r["run"], r["step"], r["mode"]) == (run, step, mode) and r["time"] != ""]
            if not rows:
                continue
            times = sorted({row["time"] for row in rows})
            norms = [np.mean([row["norm"] for row in rows if row["time"] == time]) for time in times]
            axis.plot(times, norms, marker="o", ms=3, label=f"{run}, {mode}")
    axis.set(xlabel="time t (1 is noise)", ylabel="mean gradient norm of a token", ylim=(0, None))
    axis.legend(fontsize=7)


def summary_cases(stability):
    """The numbers of the last checkpoint of each run that the curves and outcome.md show.

    Args:
        stability: rows of stability.csv.

    Returns:
        dict (run, mode) -> dict (level, what is compared) -> dict of numbers. These are averaged over the rows of a
        case, for example over all pairs of times. `overlap_limit` and `spearman_limit` are the largest values that
        chance can explain: the upper end of the wider interval, by permutation or on the torus.
    """
    last = _last_steps([row for row in stability if row["between"] in (HALVES, DRAWS)])
    found = {}
    for row in stability:
        if row["step"] != last.get(row["run"]) or row["between"] not in (HALVES, TIMES, DRAWS, CHECKPOINTS):
            continue
        found.setdefault((row["run"], row["mode"]), {}).setdefault((row["level"], row["between"]), []).append(row)
    keys = ("spearman", "spearman_low", "spearman_high", "overlap", "overlap_chance", "overlap_low", "overlap_high")
    for cases in found.values():
        for case, rows in cases.items():
            cases[case] = {key: float(np.mean([row[key] for row in rows])) for key in keys}
            for key in ("overlap", "spearman"):
                highs = [max(row[f"{key}_high"], row.get(f"{key}_turned_high", -1)) for row in rows]
                cases[case][f"{key}_limit"] = float(np.mean(highs))
    return found


def _overlaps(axis, stability):
    cases = summary_cases(stability)
    order = [(MEAN_MAP, HALVES), (MEAN_MAP, TIMES), (MEAN_MAP, CHECKPOINTS)]
    order += [(SINGLE, TIMES), (SINGLE, CHECKPOINTS), (SINGLE, DRAWS)]
    order = [case for case in order if any(case in found for found in cases.values())]
    width = 0.8 / max(len(cases), 1)
    for number, ((run, mode), found) in enumerate(cases.items()):
        for place, case in enumerate(order):
            if case not in found:
                continue
            row, x = found[case], place + (number - (len(cases) - 1) / 2) * width
            label = f"{run}, {mode}" if case == next(c for c in order if c in found) else None
            axis.bar(x, row["overlap"], 0.9 * width, color=f"C{number}", label=label)
            low, high = row["overlap_chance"] - row["overlap_low"], row["overlap_high"] - row["overlap_chance"]
            axis.errorbar(x, row["overlap_chance"], yerr=[[max(low, 0)], [max(high, 0)]], color="k", capsize=2, lw=1)
    axis.set_xticks(range(len(order)), [f"{level},\n{between}" for level, between in order], fontsize=7)
    axis.set(ylabel="overlap of the top sets (black: chance, 95 %)", ylim=(0, 1))
    axis.legend(fontsize=7)


def _course(axis, stability):
    drawn = False
    for run in dict.fromkeys(row["run"] for row in stability):
        for mode in MODES:
            rows = [
                row
                for row in stability
                if (row["run"], row["mode"], row["between"], row["level"]) == (run, mode, CHECKPOINTS, SINGLE)
            ]
            steps = sorted({row["step"] for row in rows})
            before = {row["step"]: max((r["a"] for r in rows if r["step"] == row["step"])) for row in rows}
            points = [
                (step, next(row["overlap"] for row in rows if row["step"] == step and row["a"] == before[step]))
                for step in steps
            ]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=f"{run}, {mode}")
                chance, drawn = rows[0]["overlap_chance"], True
    if drawn:
        axis.axhline(chance, color="k", lw=1, ls=":", label="chance")
        axis.legend(fontsize=7)
    else:
        axis.axis("off")
        axis.text(0.5, 0.5, "one checkpoint per run: no course", ha="center", transform=axis.transAxes)
    axis.set(xlabel="step", ylabel="overlap of single images' top sets\nwith the checkpoint before", ylim=(0, 1))


def _agreements(axis, agreement):
    last = _last_steps(agreement)
    pairs = list(dict.fromkeys(row["pair"] for row in agreement))
    width = 0.8 / max(len(last), 1)
    for number, (run, step) in enumerate(last.items()):
        rows = {r["pair"]: r for r in agreement if (r["run"], r["step"], r["place"]) == (run, step, "all")}
        for place, pair in enumerate(pairs):
            if pair in rows:
                y = place + (number - (len(last) - 1) / 2) * width
                axis.barh(
                    y, rows[pair]["cosine"], 0.9 * width, xerr=rows[pair]["standard_error"] or 0, color=f"C{number}",
                    label=run if pair == next(p for p in pairs if p in rows) else None,
                )  # fmt: skip
    axis.set_yticks(range(len(pairs)), [pair.replace(", ", ",\n") for pair in pairs], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel="cosine of the trunk's alignment gradients (lines: standard error)")
    axis.axvline(0, color="k", lw=0.5)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(last))
