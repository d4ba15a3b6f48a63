"""Convert measurements to rows of tables.

The paper's measurements are in shares.csv (the largest and smallest share of images with a position in the top set) and
gap.csv (the stability gap). Our own are in positions.csv (maps), stability.csv (agreement and chance),
concentration.csv, and agreement.csv (gradients of the trunk).
"""

import csv
from itertools import combinations

import numpy as np

from maskalign.analysis.measure import FULL
from maskalign.analysis.stability import (
    compare_images,
    compare_maps,
    concentration,
    share_ratio,
    top_size,
    top_tokens,
)

# Names of the comparisons, as in the tables.
HALVES, TIMES, DRAWS, CHECKPOINTS, WAYS, RUNS = "halves of the data", "times", "draws", "checkpoints", "ways", "runs"
MEAN_MAP, SINGLE = "mean map", "single images"
SHARE_COLUMNS = (
    "run", "step", "time", "patches", "chance", "largest", "smallest", "ratio", "ratio_low", "ratio_high", "at_least",
    "chance_ratio", "chance_high", "images", "observations",
)  # fmt: skip
GAP_COLUMNS = (
    "run", "step", "mask_ratio", "time", "patches", "kept", "full_loss", "subset_loss", "gap", "standard_error",
    "subset_deviation", "matched_gap", "matched_error", "images", "subsets",
)  # fmt: skip
POSITION_COLUMNS = ("run", "step", "mode", "time", "row", "column", "norm", "top_frequency", "cosine")
STABILITY_COLUMNS = (
    "run", "step", "mode", "level", "between", "a", "b", "images",
    "spearman", "spearman_low", "spearman_high", "spearman_turned_low", "spearman_turned_high",
    "overlap", "overlap_chance", "overlap_low", "overlap_high", "overlap_turned_low", "overlap_turned_high",
)  # fmt: skip
CONCENTRATION_COLUMNS = ("run", "step", "mode", "taken", "taken_chance", "taken_low", "taken_high", "most_frequent")
AGREEMENT_COLUMNS = ("run", "step", "pair", "place", "cosine", "standard_error", "groups", "group_size")


def position_rows(subject, found, settings):
    """Rows of positions.csv for one checkpoint: one per mode, time (empty for all times) and token position.

    Norm and top frequency are means over the images and draws in which the position was aligned.
    """
    rows = []
    columns = subject.model.grid[1]
    for mode, norms in found.norms.items():
        top = top_tokens(norms, settings.top)
        present = np.isfinite(norms)
        for place, time in [(slice(None), "")] + list(enumerate(settings.times)):
            seen = present[place].reshape(-1, present.shape[-1]).sum(axis=0)
            frequency = top[place].reshape(-1, top.shape[-1]).sum(axis=0) / np.maximum(seen, 1)
            cosine = found.cosines[mode][place]
            cosine = cosine.mean(axis=0) if time == "" else cosine
            for token, norm in enumerate(found.map(mode, place)):
                rows.append(
                    dict(
                        run=subject.run, step=subject.step, mode=mode, time=time, row=token // columns,
                        column=token % columns, norm=norm, top_frequency=frequency[token], cosine=cosine[token],
                    )
                )  # fmt: skip
    return rows


def share_rows(subject, found, settings):
    """Rows of shares.csv for one checkpoint, all tokens aligned: one per time (empty for all times).

    A position's share is the share of images and draws (and times) in which the position is among the top
    `settings.top`. A row has the largest and the smallest share; all shares are `top_frequency` in positions.csv.
    """
    norms, rows = found.norms[FULL], []
    tokens, images = norms.shape[-1], norms.shape[-2]
    for place, time in [(slice(None), "")] + list(enumerate(settings.times)):
        flat = norms[place].reshape(-1, images, tokens)
        ends = share_ratio(
            top_tokens(flat, settings.top), np.isfinite(flat), min(100, settings.permutations), settings.seed
        )
        rows.append(
            dict(
                run=subject.run, step=subject.step, time=time, patches=tokens,
                chance=top_size(tokens, settings.top) / tokens, largest=ends.largest, smallest=ends.smallest,
                ratio=ends.ratio.value, ratio_low=ends.interval[0], ratio_high=ends.interval[1],
                at_least=int(ends.at_least), chance_ratio=ends.ratio.expected, chance_high=ends.ratio.high,
                images=images, observations=len(flat) * images,
            )
        )  # fmt: skip
    return rows


def gap_rows(subject, losses, kept, settings):
    """Rows of gap.csv for one checkpoint: losses and gap for each time (empty for all times); [] without losses.

    The standard error is over images; each image counts once, with the mean over its subsets (and times). The deviation
    over subsets is the standard deviation of the mean gap of all images between draws of subsets. The matched gap
    estimates the same number with less spread, see `evaluation.gap`.
    """
    if losses is None:
        return []
    rows, (subsets, images) = [], losses.subset.shape[1:]
    for place, time in [(slice(None), "")] + list(enumerate(settings.times)):
        gaps, matched = losses.gaps(place), losses.gaps(place, matched=True)
        rows.append(
            dict(
                run=subject.run, step=subject.step, mask_ratio=settings.mask_ratio, time=time,
                patches=subject.model.num_tokens, kept=kept, full_loss=losses.full[place].mean(),
                subset_loss=losses.subset[place].mean(), gap=gaps.mean(),
                standard_error=gaps.mean(axis=0).std(ddof=1) / images**0.5,
                subset_deviation=gaps.mean(axis=1).std(ddof=1), matched_gap=matched.mean(),
                matched_error=matched.mean(axis=0).std(ddof=1) / images**0.5, images=images, subsets=subsets,
            )
        )  # fmt: skip
    return rows


def concentration_row(subject, mode, norms, settings):
    """Row of concentration.csv: the share of top tokens at the most frequent positions, compared with chance."""
    tokens, images = norms.shape[-1], norms.shape[-2]
    flat = norms.reshape(-1, images, tokens)
    frequency, taken = concentration(
        top_tokens(flat, settings.top), np.isfinite(flat), settings.top, min(200, settings.permutations), settings.seed
    )
    return dict(
        run=subject.run, step=subject.step, mode=mode, taken=taken.value, taken_chance=taken.expected,
        taken_low=taken.low, taken_high=taken.high, most_frequent=float(frequency.max()),
    )  # fmt: skip


def stability_rows(subject, found, settings):
    """Rows of stability.csv within one checkpoint: halves of the data, times, draws, and the ways to align."""
    rows = []
    last = len(settings.times) - 1
    for mode, norms in found.norms.items():
        own = dict(run=subject.run, step=subject.step, mode=mode, images=norms.shape[-2])
        even, odd = (found.map(mode, images=slice(start, None, 2)) for start in (0, 1))
        rows.append(_maps(subject, settings, even, odd, own, between=HALVES, a="even", b="odd"))
        for a, b in combinations(range(last + 1), 2):
            named = dict(between=TIMES, a=settings.times[a], b=settings.times[b])
            rows.append(_maps(subject, settings, found.map(mode, a), found.map(mode, b), own, **named))
            rows.append(_images(settings, norms[a], norms[b], own, **named))
        rows.append(_images(settings, norms[:, :-1], norms[:, 1:], own, between=DRAWS, a="one", b="the next"))
    for a, b in combinations(found.norms, 2):
        own = dict(run=subject.run, step=subject.step, mode=a, images=norms.shape[-2])
        rows.append(_maps(subject, settings, found.map(a), found.map(b), own, between=WAYS, a=a, b=b))
    return [row for row in rows if row is not None]


def checkpoint_rows(subjects, founds, settings):
    """Rows of stability.csv between all checkpoints of one run, on the same images, times and draws."""
    rows = []
    for (a, first), (b, second) in combinations(zip(subjects, founds, strict=True), 2):
        for mode in first.norms:
            own = dict(run=b.run, step=b.step, mode=mode, images=first.norms[mode].shape[-2])
            named = dict(between=CHECKPOINTS, a=_step(a), b=_step(b))
            rows.append(_maps(b, settings, first.map(mode), second.map(mode), own, **named))
            rows.append(_images(settings, first.norms[mode], second.norms[mode], own, **named))
    return [row for row in rows if row is not None]


def run_rows(subjects, founds, settings):
    """Rows of stability.csv between the last checkpoints of several runs, for full-token alignment."""
    rows = []
    for (a, first), (b, second) in combinations(zip(subjects, founds, strict=True), 2):
        own = dict(run=b.run, step=b.step, mode="full", images=first.norms["full"].shape[-2])
        named = dict(between=RUNS, a=a.run, b=b.run)
        rows.append(_maps(b, settings, first.map("full"), second.map("full"), own, **named))
        rows.append(_images(settings, first.norms["full"], second.norms["full"], own, **named))
    return rows


def agreement_rows(subject, found, group_size):
    """Rows of agreement.csv: mean and standard error over groups of images."""
    rows = []
    for pair, places in found.items():
        for place, cosines in places.items():
            values = np.array(cosines)
            error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else ""
            rows.append(
                dict(
                    run=subject.run, step=subject.step, pair=pair, place=place, cosine=values.mean(),
                    standard_error=error, groups=len(values), group_size=group_size,
                )
            )  # fmt: skip
    return rows


def write_csv(path, columns, rows):
    """Write a CSV file with six significant digits; unknown values are empty cells."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _text(value) for key, value in row.items()})


def _text(value):
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else value


def _step(subject):
    return "" if subject.step is None else subject.step


def _maps(subject, settings, first, second, own, **named):
    result = compare_maps(first, second, subject.model.grid, settings.top, settings.permutations, settings.seed)
    return {**own, **named, "level": MEAN_MAP, **_columns(result)}


def _images(settings, first, second, own, **named):
    result = compare_images(first, second, settings.top)
    return None if result is None else {**own, **named, "level": SINGLE, **_columns(result)}


def _columns(agreement):
    spearman, overlap = agreement.spearman, agreement.overlap
    columns = dict(
        spearman=spearman.value, spearman_low=spearman.low, spearman_high=spearman.high, overlap=overlap.value,
        overlap_chance=overlap.expected, overlap_low=overlap.low, overlap_high=overlap.high,
    )  # fmt: skip
    if agreement.spearman_turned is not None:
        columns["spearman_turned_low"], columns["spearman_turned_high"] = agreement.spearman_turned
        columns["overlap_turned_low"], columns["overlap_turned_high"] = agreement.overlap_turned
    return columns
