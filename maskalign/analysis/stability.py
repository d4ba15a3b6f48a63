"""Measure how much two maps over the tokens agree, compared with chance.

A map is a row of N numbers, with NaN for an absent token. There are two measures: Spearman's rank correlation over the
tokens that both maps have, and the overlap of the two sets of largest tokens (the top share).

Chance is described in three ways:
- the expectation for two random sets, computed analytically: two random sets of m of N tokens share m * m / N tokens
  on average;
- the interval that contains 95 % of random permutations of one map. For means over images it is computed from the exact
  variance over independent images, which is hypergeometric for the overlap and 1 / (n - 1) for the correlation;
- the same interval for moving one map on the torus (all shifts, turns and mirror images of the token grid), which keeps
  neighbors together. Smooth maps agree by chance more often than random permutations do, and this interval includes
  that.
"""

from typing import NamedTuple, Optional

import numpy as np
from scipy.stats import hypergeom, rankdata

SIDES = (2.5, 97.5)
NORMAL = 1.959963984540054


class Chance(NamedTuple):
    """A measured value, its expectation by chance, and the 95 % interval (low, high) of chance."""

    value: float
    expected: float
    low: float
    high: float

    @property
    def excess(self):
        """The value scaled so that 0 is chance and 1 is perfect agreement; negative below chance."""
        return (self.value - self.expected) / (1 - self.expected)

    @property
    def beyond(self):
        """True if the value is above the interval of chance."""
        return self.value > self.high


class Agreement(NamedTuple):
    """Spearman's correlation and the top overlap of two maps; `*_turned` are the intervals on the torus."""

    spearman: Chance
    overlap: Chance
    spearman_turned: Optional[tuple] = None
    overlap_turned: Optional[tuple] = None


def top_size(count, share=0.1):
    """Size of the top set among `count` tokens: the nearest whole number, at least 1."""
    return max(1, int(share * count + 0.5))


def top_tokens(maps, share=0.1):
    """Mark the tokens that are among the largest of their row.

    Args:
        maps: (..., N); NaN for absent tokens, the same number of them in every row.
        share: share of the present tokens.

    Returns:
        bool, same shape; among equal values the first tokens are chosen.
    """
    maps = np.asarray(maps)
    present = np.isfinite(maps).sum(axis=-1)
    if present.size and (present != present.flat[0]).any():
        raise ValueError("rows have different numbers of tokens")
    size = top_size(int(present.flat[0]), share) if present.size else 0
    order = np.argsort(np.where(np.isfinite(maps), -maps, np.inf), axis=-1, kind="stable")
    top = np.zeros(maps.shape, dtype=bool)
    np.put_along_axis(top, order[..., :size], True, axis=-1)
    return top


def overlap(first, second):
    """The share of common elements of two sets of equal size, |A and B| / |A|: two bool (..., N) -> (...)."""
    size = np.maximum(first.sum(axis=-1), second.sum(axis=-1))
    return (first & second).sum(axis=-1) / np.maximum(size, 1)


def rank_correlation(first, second):
    """Spearman's correlation along the last axis, over the tokens that both rows have: two (..., N) -> (...).

    The result is NaN if a row is constant or fewer than two tokens are shared.
    """
    first, second = np.broadcast_arrays(np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64))
    both = np.isfinite(first) & np.isfinite(second)
    counts = np.maximum(both.sum(axis=-1, keepdims=True), 1)
    ranks = []
    for values in (first, second):
        # Absent tokens rank after all present ones, so they do not change the ranks of the others.
        rank = rankdata(np.where(both, values, np.inf), axis=-1)
        rank = np.where(both, rank, 0)
        ranks.append(np.where(both, rank - rank.sum(axis=-1, keepdims=True) / counts, 0))
    a, b = ranks
    scale = np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(scale > 0, (a * b).sum(axis=-1) / scale, np.nan)


def random_orders(tokens, count, seed=0):
    """`count` random permutations of N tokens, (count, N) int64."""
    return np.random.default_rng([seed, tokens]).permuted(np.tile(np.arange(tokens), (count, 1)), axis=1)


def turned_orders(grid):
    """All orders of a (rows, columns) grid moved on the torus, (count, N) int64, without the unchanged grid.

    These are all shifts, of the grid and its mirror images and, for a square grid, its turns.
    """
    rows, columns = grid
    plain = np.arange(rows * columns).reshape(grid)
    views = [plain, plain[::-1], plain[:, ::-1], plain[::-1, ::-1]]
    if rows == columns:
        views += [view.T for view in views]
    shifts = [(down, right) for down in range(rows) for right in range(columns)]
    turned = [np.roll(view, shift, axis=(0, 1)).ravel() for view in views for shift in shifts]
    return np.unique(np.array(turned[1:]), axis=0)


def compare_maps(first, second, grid, share=0.1, permutations=1000, seed=0):
    """Agreement of two maps, e.g. the mean maps of two halves of the data.

    Args:
        first, second: (N,) without NaN.
        grid: (rows, columns) of the tokens.

    Returns:
        Agreement with intervals by permutation and on the torus.
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    tokens = len(first)
    size = top_size(tokens, share)
    tops = top_tokens(first, share), top_tokens(second, share)
    intervals = []
    for orders in (random_orders(tokens, permutations, seed), turned_orders(grid)):
        correlations = rank_correlation(first[orders], second)
        shares = overlap(tops[0][orders], tops[1])
        intervals.append([tuple(np.percentile(values, SIDES)) for values in (correlations, shares)])
    (spearman, shared), turned = intervals
    return Agreement(
        Chance(float(rank_correlation(first, second)), 0.0, *spearman),
        Chance(float(overlap(*tops)), size / tokens, *shared),
        *turned,
    )


def compare_images(first, second, share=0.1):
    """Mean agreement of the maps of single images, e.g. the same images at two times.

    Args:
        first, second: (..., images, N); NaN for absent tokens. The mean includes leading axes, but they do not narrow
            the interval, because several draws of one image are not independent.
        share: share of the tokens in the top set.

    Returns:
        Agreement, or None if no image has two tokens in both maps.
    """
    first, second = np.asarray(first), np.asarray(second)
    images, tokens = first.shape[-2:]
    correlations = rank_correlation(first, second)
    correlations = correlations[np.isfinite(correlations)]
    if not correlations.size:
        return None
    both = np.isfinite(first) & np.isfinite(second)
    shared = both.sum(axis=-1)
    # If both have the same tokens, chance draws both sets among these; else it draws each among all N.
    same = bool((np.isfinite(first) == np.isfinite(second)).all())
    tops = top_tokens(first, share), top_tokens(second, share)
    size = int(tops[0].reshape(-1, tokens)[0].sum())
    law = hypergeom(int(shared.flat[0]) if same else tokens, size, size)
    spread = NORMAL * np.sqrt(law.var() / images) / size
    expected = law.mean() / size
    wide = NORMAL * np.sqrt(np.mean(1 / np.maximum(shared - 1, 1)) / images)
    return Agreement(
        Chance(float(correlations.mean()), 0.0, -wide, wide),
        Chance(float(overlap(*tops).mean()), expected, max(0.0, expected - spread), expected + spread),
    )


def fixed_ranking_overlap(tokens, kept, share=0.1, draws=4000, seed=0):
    """Overlap of the top sets of two independent subsets, for a ranking of all tokens that does not change.

    This is the effect of drawing subsets alone: the overlap for perfectly stable gradients.

    Args:
        tokens, kept: N and K; the result is 1 for K = N.
        share: share of the kept tokens in the top set.
        draws: number of pairs of subsets, drawn uniformly.
    """
    rng, size = np.random.default_rng([seed, 2]), top_size(kept, share)
    # Tokens are numbered by their rank, so the first elements of a sorted subset are its top set.
    first, second = (
        np.sort(np.argsort(rng.random((draws, tokens)), axis=1)[:, :kept], axis=1)[:, :size] for _ in range(2)
    )
    return float((first[:, :, None] == second[:, None, :]).any(axis=2).mean())


def concentration(top, present, share=0.1, permutations=200, seed=0):
    """The share of all top tokens that are at the most frequent positions, compared with chance.

    Args:
        top, present: (repeats, images, N) bool; the repeats of an image (times, draws) are permuted together.
        share: share of the positions, and of the tokens that `top` marks.

    Returns:
        (frequency, taken): frequency is (N,), how often a position is in the top set when it is present; taken is the
        `Chance` of the share of all top tokens at the `share` most frequent positions.
    """
    size = top_size(top.shape[-1], share)

    def taken(counts):
        found = _frequency(counts)
        return np.sort(found)[::-1][:size].sum() / found.sum()

    counts = _counts(top, present)
    value, by_chance = taken(counts.sum(axis=1)), [taken(one) for one in _permuted(counts, permutations, seed)]
    return _frequency(counts.sum(axis=1)), Chance(value, float(np.mean(by_chance)), *np.percentile(by_chance, SIDES))


class ShareRatio(NamedTuple):
    """The largest and the smallest share of images in which a position is in the top set, and their ratio.

    ratio: `Chance` of the largest share divided by the smallest. interval: 95 % bootstrap interval of the ratio over
    the images. at_least: True if the smallest share is zero; the ratio then counts it as one observation.
    """

    largest: float
    smallest: float
    ratio: Chance
    interval: tuple
    at_least: bool


def share_ratio(top, present, permutations=100, seed=0):
    """The ratio of the largest to the smallest share of images in which a position is in the top set.

    With a smallest share of zero the ratio is not finite. The share is then replaced by one observation (an image at
    one time and draw), and the ratio is a lower bound ("at least"). With few images the ratio is above 1 by chance
    alone. Permuting the positions within every image measures this.

    Args:
        top, present: (repeats, images, N) bool, as for `concentration`.

    Returns:
        ShareRatio.
    """

    def ratio(counts):
        flags, seen = counts
        shares = _frequency(counts)
        return shares.max() / max(shares.min(), 1 / seen[shares.argmin()])

    counts = _counts(top, present)
    shares = _frequency(counts.sum(axis=1))
    by_chance = [ratio(one) for one in _permuted(counts, permutations, seed)]
    found = Chance(float(ratio(counts.sum(axis=1))), float(np.mean(by_chance)), *np.percentile(by_chance, SIDES))
    rng, images = np.random.default_rng([seed, 3]), counts.shape[1]
    drawn = [ratio(counts[:, rng.integers(images, size=images)].sum(axis=1)) for _ in range(max(permutations, 100))]
    interval = tuple(float(side) for side in np.percentile(drawn, SIDES))
    return ShareRatio(float(shares.max()), float(shares.min()), found, interval, bool(shares.min() == 0))


def _counts(top, present):
    """(2, images, N): how often a position of an image is in the top set, and how often it is present."""
    return np.stack([top.sum(axis=0), present.sum(axis=0)]).astype(np.float64)


def _permuted(counts, permutations, seed):
    """Yield the (2, N) sums of `_counts` over images, with the positions of every image permuted independently."""
    rng, (images, tokens) = np.random.default_rng([seed, 1]), counts.shape[1:]
    for _ in range(permutations):
        order = rng.permuted(np.tile(np.arange(tokens), (images, 1)), axis=1)
        yield np.take_along_axis(counts, order[None], axis=2).sum(axis=1)


def _frequency(counts):
    flags, seen = counts
    return np.divide(flags, seen, out=np.zeros_like(flags), where=seen > 0)
