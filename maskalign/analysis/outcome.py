"""The outcome in words. Every word that judges is chosen by the numbers beside it; nothing is known beforehand."""

from maskalign.analysis.agreement import FULL_PAIR, IMAGE_PAIR, MASKED_PAIR, NOISE_PAIR, PAIRS
from maskalign.analysis.measure import FULL, MASKED, MODES, SUBSET
from maskalign.analysis.pictures import ratio_text, summary_cases
from maskalign.analysis.stability import fixed_ranking_overlap
from maskalign.analysis.tables import CHECKPOINTS, DRAWS, HALVES, MEAN_MAP, RUNS, SINGLE, TIMES, WAYS

DEGREES = ((0.6, "strongly stable"), (0.3, "clearly stable"), (0.1, "weakly stable"), (0.0, "barely above chance"))


def judge(value, expected, high):
    """A verdict on an agreement: how far it is from chance (0) to perfect (1), if it leaves chance at all."""
    if value <= high + 1e-6:  # shares of few tokens are often equal, but for rounding
        return "not beyond chance"
    excess = (value - expected) / (1 - expected)
    return next(words for least, words in DEGREES if excess >= least)


def write_outcome(tables, about):
    """The report as Markdown.

    Args:
        tables: dict with lists of rows `shares`, `gap`, `positions`, `stability`, `concentration`, `agreement`.
        about: dict: data, images, times, draws, top, seed, weights, tokens, teachers, group_size; and by run: `series`
            (its steps), `settings` (a text) and `kept` (tokens in a subset).

    Returns:
        str.
    """
    lines = ["# Alignment gradients: outcome", "", *_conditions(about), ""]
    lines += _papers(tables, about)
    cases = summary_cases(tables["stability"])
    for run in about["series"]:
        lines += [f"## {run}", ""]
        lines += _places(run, tables, about)
        lines += _stability(run, cases, tables["stability"], about)
        lines += _trunk(run, tables["agreement"], about)
        lines.append("")
    lines += ["## In short", "", *[f"- {line}" for line in in_short(tables, about)], ""]
    return "\n".join(lines)


def _conditions(about):
    times = ", ".join(f"{time:g}" for time in about["times"])
    lines = [
        f"Measured on {about['images']} images of {about['data']}, at t = {times} (1 is noise), with {about['draws']} "
        f"draws of noise and subset each; weights: {about['weights']}; {about['tokens']} tokens, of which the top "
        f"{about['top']:.0%} are the largest; seed {about['seed']}. Teachers: {', '.join(about['teachers'])}.",
        "",
        "The gradient is that of the sum over aligned tokens of -cos(projector(h), z) with respect to the token's "
        "features h at the tap, before the projector; labels are kept. Chance is given by random permutations, and for "
        "mean maps also by turning one map on the torus, which keeps neighbors together: the wider interval counts.",
        "",
        "| run | checkpoints (steps) | settings |",
        "| --- | --- | --- |",
    ]
    for run, steps in about["series"].items():
        known = ", ".join("unknown" if step is None else str(step) for step in steps)
        lines.append(f"| {run} | {known} | {about['settings'][run]}, subset of {about['kept'][run]} tokens |")
    return lines


def _papers(tables, about):
    """The two measurements of the paper, by run and checkpoint, and what they come to."""
    gaps = {(row["run"], row["step"]): row for row in tables["gap"] if row["time"] == ""}
    shares = [row for row in tables["shares"] if row["time"] == ""]
    first = shares[0]
    lines = [
        "## The paper's measurements",
        "",
        "*Shares*, all tokens aligned: of the images (at all times and draws), the share in which a position's "
        f"gradient is among the top {about['top']:.0%} of the patches; chance gives {first['chance']:.3f} everywhere. "
        f"A smallest share of zero counts as one of {first['observations']} observations, and the ratio is then a "
        "lower bound. The ratio by chance comes from permuting the positions of every image.",
        "",
    ]
    head = ["run", "step", "largest share", "smallest share", "ratio (95 %)", "ratio by chance (95 %)"]
    if gaps:
        one = next(iter(gaps.values()))
        lines += [
            f"*Stability gap* G_r, mask ratio {one['mask_ratio']:g}: the alignment loss where all blocks see "
            f"{_seen(about)}{one['kept']} of {one['patches']} patches, dropped after the mixing layers, minus the loss "
            f"on all tokens, for the same images, times and noise. ± is one standard error over {one['images']} "
            f"images; the spread is the standard deviation of the mean gap over {one['subsets']} draws of the subsets. "
            "The *matched* gap estimates the same number with less spread: it compares the subset's tokens with the "
            "same tokens where the model sees all, so that it does not matter how hard the drawn patches are.",
            "",
        ]
        head += ["loss on all tokens", "G_r", "spread over subsets", "G_r, matched"]
    lines += [f"| {' | '.join(head)} |", f"| {' | '.join('---' for _ in head)} |"]
    for row in shares:
        cells = [
            row["run"], "unknown" if row["step"] is None else str(row["step"]), f"{row['largest']:.3f}",
            f"{row['smallest']:.3f}", f"{ratio_text(row)} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})",
            f"{row['chance_ratio']:.1f} (up to {row['chance_high']:.1f})",
        ]  # fmt: skip
        gap = gaps.get((row["run"], row["step"]))
        if gap is not None:
            cells += [
                f"{gap['full_loss']:+.4f}", _with_error(gap, "gap", "standard_error"),
                f"{gap['subset_deviation']:.5f}", _with_error(gap, "matched_gap", "matched_error"),
            ]  # fmt: skip
        elif gaps:
            cells += ["", "not defined", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *[f"- {line}" for line in _papers_in_short(shares, gaps, about)], ""]
    return lines


def _with_error(gap, value, error):
    return f"{gap[value]:+.5f} ± {gap[error]:.5f}"


def _seen(about):
    """Whether the class token is among what a subset holds, for the runs at hand."""
    if not any(about["class_token"].values()):
        return ""
    return "the class token and " if all(about["class_token"].values()) else "the class token (where there is one) and "


def _papers_in_short(shares, gaps, about):
    last = {row["run"]: row for row in shares}
    lines = []
    for run, row in last.items():
        beyond = "more than" if row["ratio"] > row["chance_high"] else "no more than"
        lines.append(
            f"{run}: at the last checkpoint the position most often among the top {about['top']:.0%} is there in "
            f"{row['largest']:.1%} of the cases, the one least often in {row['smallest']:.1%}: a ratio of "
            f"{ratio_text(row)}, {beyond} chance gives (up to {row['chance_high']:.1f})."
        )
        gap = gaps.get((run, row["step"]))
        if gap is None:
            lines.append(f"{run}: no stability gap, since its projector needs the whole token grid.")
        else:
            lines.append(
                f"{run}: its stability gap is {_with_error(gap, 'gap', 'standard_error')} (matched: "
                f"{_with_error(gap, 'matched_gap', 'matched_error')}, {_from_zero(gap)}), at an alignment loss of "
                f"{gap['full_loss']:+.4f} on all tokens."
            )
    runs = list(last)
    for run in runs[1:]:
        lines += _beside(runs[0], run, shares, gaps)
    return lines


def _from_zero(gap):
    within = abs(gap["matched_gap"]) <= 2 * gap["matched_error"]
    return f"{'within' if within else 'beyond'} two standard errors of zero"


def _beside(first, run, shares, gaps):
    """What another run's two measurements are beside the first run's, at the last step that both have."""
    steps = {name: [row["step"] for row in shares if row["run"] == name] for name in (first, run)}
    common = [step for step in steps[run] if step is not None and step in steps[first]]
    at = {first: common[-1], run: common[-1]} if common else {name: known[-1] for name, known in steps.items()}
    where = f"at step {common[-1]}" if common else "at their last checkpoints, which are of different steps"
    a, b = ({(row["run"], row["step"]): row for row in shares}[name, at[name]] for name in (first, run))
    if b["ratio_high"] < a["ratio_low"]:
        flatter = f"the map of {run} is flatter"
    elif b["ratio_low"] > a["ratio_high"]:
        flatter = f"the map of {run} is less flat"
    else:
        flatter = "the images are too few to tell them apart"
    lines = [f"{run} beside {first}, {where}: ratios {ratio_text(b)} and {ratio_text(a)}; {flatter}."]
    a, b = (gaps.get((name, at[name])) for name in (first, run))
    if a is None or b is None:
        return lines
    lower = "lower" if b["full_loss"] < a["full_loss"] else "not lower"
    line = (
        f"{run} beside {first}, {where}: its alignment loss on all tokens is {lower} ({b['full_loss']:+.4f} and "
        f"{a['full_loss']:+.4f}), its matched stability gap "
    )
    if a["matched_gap"] <= 2 * a["matched_error"]:
        line += f"{b['matched_gap']:+.5f}; it is not put as a share of {first}'s, which is not clearly above zero"
    else:
        share = b["matched_gap"] / a["matched_gap"]
        errors = b["matched_error"] / a["matched_gap"], share * a["matched_error"] / a["matched_gap"]
        line += f"{share:.1%} ± {(errors[0] ** 2 + errors[1] ** 2) ** 0.5:.1%} of {first}'s"
    return [*lines, line + "."]


def _last(rows, run):
    rows = [row for row in rows if row["run"] == run]
    return [row for row in rows if row["step"] == rows[-1]["step"]] if rows else []


def _places(run, tables, about):
    """Where the norms are large at the last checkpoint, by position, for each way to align."""
    lines = []
    for row in _last(tables["concentration"], run):
        maps = [r for r in _last(tables["positions"], run) if r["mode"] == row["mode"] and r["time"] == ""]
        norms = [r["norm"] for r in maps]
        mean = sum(norms) / len(norms)
        spread = (sum((norm - mean) ** 2 for norm in norms) / len(norms)) ** 0.5 / mean
        above = row["taken"] > row["taken_high"]
        lines.append(
            f"- **By position, {MODES[row['mode']]}**: the mean norm varies by {spread:.0%} (standard deviation over "
            f"mean), from {min(norms) / mean:.2f} to {max(norms) / mean:.2f} of its mean. The {about['top']:.0%} of "
            f"positions most often at the top take {row['taken']:.1%} of all top places, "
            f"{'more than' if above else 'which is within'} what chance gives ({row['taken_low']:.1%} to "
            f"{row['taken_high']:.1%}); the most frequent position is at the top in {row['most_frequent']:.1%} of its "
            "appearances."
        )
    return lines


def _stability(run, cases, rows, about):
    lines = [
        "",
        f"Overlap of the sets of the top {about['top']:.0%}, and Spearman's rank correlation of all tokens, at the "
        "last checkpoint; in brackets what chance gives on average, and reaches:",
        "",
        "| way to align | level | between | overlap | the top set is | correlation | the ranks are |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for mode in MODES:
        for (level, between), case in cases.get((run, mode), {}).items():
            lines.append(
                f"| {mode} | {level} | {between} | {case['overlap']:.3f} ({case['overlap_chance']:.3f}, up to "
                f"{case['overlap_limit']:.3f}) | {_verdict(case)} | {case['spearman']:+.2f} (0, up to "
                f"{case['spearman_limit']:.2f}) | {_verdict(case, 'spearman')} |"
            )
    lines.append("")
    for row in _last(rows, run):
        if row["between"] == WAYS:
            lines.append(
                f"- Mean maps of *{row['a']}* and *{row['b']}*: correlation {row['spearman']:+.2f}, overlap "
                f"{row['overlap']:.2f} (chance {row['overlap_chance']:.3f}, up to "
                f"{max(row['overlap_high'], row['overlap_turned_high']):.2f})."
            )
    return lines


def _verdict(case, key="overlap"):
    return judge(case[key], case["overlap_chance"] if key == "overlap" else 0, case[f"{key}_limit"])


def _trunk(run, rows, about):
    lines = ["", f"Cosine of the trunk's alignment gradients, {about['group_size']} images behind each gradient:", ""]
    places = list(dict.fromkeys(row["place"] for row in _last(rows, run)))
    places = ["all", *[place for place in places if place != "all"]]
    lines += [f"| between | {' | '.join(places)} |", f"| --- |{' --- |' * len(places)}"]
    for pair in PAIRS:
        found = {row["place"]: row for row in _last(rows, run) if row["pair"] == pair}
        if found:
            values = [_value(found.get(place)) for place in places]
            lines.append(f"| {PAIRS[pair]} | {' | '.join(values)} |")
    return lines


def _value(row):
    if row is None:
        return ""
    error = row["standard_error"]
    return f"{row['cosine']:.3f}" + ("" if error == "" else f" ± {error:.3f}")


def in_short(tables, about):
    """Sentences that answer the paper's question for each run, and compare the ways to align."""
    cases, lines = summary_cases(tables["stability"]), []
    for run in about["series"]:
        full = cases[run, FULL]
        tests = {
            "between halves of the data": full.get((MEAN_MAP, HALVES)),
            "between times, image by image": full.get((SINGLE, TIMES)),
            "between checkpoints, image by image": full.get((SINGLE, CHECKPOINTS)),
        }
        tests = {name: case for name, case in tests.items() if case is not None}
        sets, ranks = (
            [f"{_verdict(case, key)} {name} ({case[key]:.2f})" for name, case in tests.items()]
            for key in ("overlap", "spearman")
        )
        beyond = [case[k] > case[f"{k}_limit"] + 1e-6 for case in tests.values() for k in ("overlap", "spearman")]
        finding = {len(beyond): "is seen here", 0: "is not seen here"}.get(sum(beyond), "is seen here in part")
        lines.append(
            f"{run}: that large alignment gradients keep their places under full-token alignment {finding} "
            f"({sum(beyond)} of {len(beyond)} tests beyond chance). The sets of the top {about['top']:.0%} (overlap by "
            f"chance {next(iter(tests.values()))['overlap_chance']:.2f}) are {', '.join(sets)}. The ranks of all "
            f"tokens (correlation by chance 0) are {', '.join(ranks)}."
        )
        lines += _course(run, tables["stability"])
        lines += _drawn_sets(run, cases, about)
        lines += _trunk_in_short(run, tables["agreement"])
    return lines + _between_runs(tables["stability"])


def _between_runs(rows):
    """Whether two runs pull on the same tokens, all tokens aligned, the same images, times and noise."""
    lines = []
    for row in rows:
        if row["between"] == RUNS and row["level"] == SINGLE:
            pair = (RUNS, MEAN_MAP, row["a"], row["b"])
            mean = next(r for r in rows if (r["between"], r["level"], r["a"], r["b"]) == pair)
            above = "beyond" if row["overlap"] > row["overlap_high"] else "within"
            lines.append(
                f"{row['a']} and {row['b']}, all tokens aligned: the top sets of the same images overlap by "
                f"{row['overlap']:.2f} between the two models, {above} chance ({row['overlap_chance']:.2f}, up to "
                f"{row['overlap_high']:.2f}); their mean maps correlate by {mean['spearman']:+.2f}."
            )
    return lines


def _course(run, rows):
    """How the top sets of single images moved over training: from each checkpoint to the next, and over all of it."""
    rows = [row for row in rows if (row["run"], row["mode"], row["between"]) == (run, FULL, CHECKPOINTS)]
    pairs = {(row["a"], row["b"]): row for row in rows if row["level"] == SINGLE}
    if not pairs:
        return []
    steps = list(dict.fromkeys(step for pair in pairs for step in pair))

    def words(a, b):
        row = pairs[a, b]
        verdict = judge(row["overlap"], row["overlap_chance"], row["overlap_high"])
        return f"{a} to {b} {row['overlap']:.2f}, {verdict}"

    found = [words(a, b) for a, b in zip(steps, steps[1:], strict=False)]
    line = (
        f"{run}, all tokens aligned, overlap of an image's top set from one checkpoint to the next: {'; '.join(found)}"
    )
    return [line + (f". First to last: {words(steps[0], steps[-1])}." if len(steps) > 2 else ".")]


def _drawn_sets(run, cases, about):
    full = cases[run, FULL].get((SINGLE, DRAWS))
    lines = []
    for mode in (MASKED, SUBSET):
        other = cases.get((run, mode), {}).get((SINGLE, DRAWS))
        if other is None or full is None:
            continue
        fixed = fixed_ranking_overlap(about["tokens"], about["kept"][run], about["top"])
        lines.append(
            f"{run}, {MODES[mode]}: from one draw to the next the most strongly pulled tokens of an image overlap by "
            f"{other['overlap']:.2f} (chance {other['overlap_chance']:.2f}; a ranking that never changes would give "
            f"{fixed:.2f}), against {full['overlap']:.2f} under full-token alignment (chance "
            f"{full['overlap_chance']:.2f}): drawing subsets "
            f"{'loosens' if other['overlap'] < full['overlap'] else 'does not loosen'} the set. Among the tokens that "
            f"both draws kept, ranks correlate by {other['spearman']:+.2f} ({full['spearman']:+.2f} with all tokens)."
        )
    return lines


def _trunk_in_short(run, rows):
    found = {row["pair"]: row for row in _last(rows, run) if row["place"] == "all"}
    subsets = found.get(MASKED_PAIR) or found.get(FULL_PAIR)
    noise, images = found.get(NOISE_PAIR), found.get(IMAGE_PAIR)
    if subsets is None or noise is None:
        return []
    line = (
        f"{run}: trunk gradients of two random subsets of the same images agree by {subsets['cosine']:.2f}, "
        f"{_more(subsets, noise)} those of all tokens under other noise ({noise['cosine']:.2f})"
    )
    if images is not None:
        line += f", and {_more(subsets, images)} those of other images ({images['cosine']:.2f})"
    return [line + "."]


def _more(one, other):
    """How two mean cosines compare, given their standard errors: `more than`, `less than`, or `about as much as`."""
    errors = [0 if row["standard_error"] == "" else row["standard_error"] for row in (one, other)]
    if abs(one["cosine"] - other["cosine"]) <= 2 * sum(error**2 for error in errors) ** 0.5:
        return "about as much as"
    return "more than" if one["cosine"] > other["cosine"] else "less than"
