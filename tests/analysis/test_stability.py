"""The measures of stability against scipy, closed forms, planted maps and maps of pure chance."""

from math import comb

import numpy as np
import pytest
from scipy.stats import spearmanr

from maskalign.analysis.stability import (
    compare_images,
    compare_maps,
    concentration,
    fixed_ranking_overlap,
    overlap,
    rank_correlation,
    share_ratio,
    top_size,
    top_tokens,
    turned_orders,
)

GRID = (8, 8)


def test_rank_correlation_is_scipys_with_ties_and_absent_tokens(seed):
    rng = np.random.default_rng(seed)
    first, second = rng.integers(0, 9, (2, 20, 31)).astype(float)
    second += first
    first[rng.random(first.shape) < 0.2] = np.nan
    second[rng.random(first.shape) < 0.2] = np.nan
    found = rank_correlation(first, second)
    for row in range(20):
        both = np.isfinite(first[row]) & np.isfinite(second[row])
        assert found[row] == pytest.approx(spearmanr(first[row][both], second[row][both]).statistic, abs=1e-12)
    assert np.isnan(rank_correlation(np.ones(5), np.arange(5.0)))
    assert np.isnan(rank_correlation([np.nan, 1, 2], [1, np.nan, np.nan]))


def test_top_sets_and_their_overlap():
    maps = np.array([[5.0, 1, 4, 3, 2, 0, -1, -2, -3, -4], [0, 9, np.nan, 8, 7, 6, 5, 4, 3, 2]])
    with pytest.raises(ValueError, match="different numbers"):
        top_tokens(maps)
    first, second = top_tokens(maps[0], 0.3), top_tokens(maps[1], 0.3)
    assert np.flatnonzero(first).tolist() == [0, 2, 3] and np.flatnonzero(second).tolist() == [1, 3, 4]
    assert overlap(first, second) == pytest.approx(1 / 3) and overlap(first, first) == 1
    assert [top_size(n) for n in (3, 10, 64, 256)] == [1, 1, 6, 26]
    assert np.flatnonzero(top_tokens(np.zeros(20))).tolist() == [0, 1]


def test_random_images_agree_as_chance_says():
    first, second = np.random.default_rng(1).normal(size=(2, 2000, 64))
    result = compare_images(first, second)
    assert result.overlap.expected == pytest.approx(6 / 64)
    assert result.overlap.low < result.overlap.value < result.overlap.high
    assert result.spearman.low < result.spearman.value < result.spearman.high
    # The width is that of the law: over many sets of images, one in twenty falls outside.
    outside = []
    for number in range(200):
        first, second = np.random.default_rng([2, number]).normal(size=(2, 40, 32))
        result = compare_images(first, second)
        outside.append([not chance.low <= chance.value <= chance.high for chance in result[:2]])
    assert (np.mean(outside, axis=0) > 0.01).all() and (np.mean(outside, axis=0) < 0.11).all()


def test_independently_drawn_subsets_agree_as_chance_says():
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 2000, 64))
    for maps in (first, second):
        np.put_along_axis(maps, rng.permuted(np.tile(np.arange(64), (2000, 1)), axis=1)[:, :32], np.nan, axis=1)
    result = compare_images(first, second)
    assert result.overlap.expected == pytest.approx(3 / 64)
    assert result.overlap.low < result.overlap.value < result.overlap.high
    assert result.spearman.low < result.spearman.value < result.spearman.high
    # The same subset twice: sets are random among its tokens.
    second = np.where(np.isfinite(first), rng.normal(size=first.shape), np.nan)
    result = compare_images(first, second)
    assert result.overlap.expected == pytest.approx(3 / 32)
    assert result.overlap.low < result.overlap.value < result.overlap.high


def test_random_maps_stay_in_the_permutation_interval():
    inside = []
    for number in range(80):
        first, second = np.random.default_rng([4, number]).normal(size=(2, 32))
        result = compare_maps(first, second, (4, 8), permutations=200)
        inside.append([chance.low <= chance.value <= chance.high for chance in result[:2]])
    assert result.overlap.expected == pytest.approx(3 / 32)
    assert (np.mean(inside, axis=0) > 0.88).all()


def test_equal_and_opposite_maps():
    maps = np.random.default_rng(5).normal(size=64)
    same, opposite = compare_maps(maps, maps, GRID), compare_maps(maps, -maps, GRID)
    assert same.overlap.value == 1 and same.overlap.beyond and same.overlap.excess == pytest.approx(1)
    assert same.spearman.value == pytest.approx(1) and opposite.spearman.value == pytest.approx(-1)
    assert opposite.overlap.value == 0 and not opposite.overlap.beyond


def test_smooth_maps_have_a_wider_chance_on_the_torus():
    rows, columns = np.mgrid[:8, :8]
    slope = (rows + 0.01 * columns).ravel().astype(float)
    result = compare_maps(slope, slope[::-1], GRID)
    assert result.spearman_turned[1] > 0.9 > result.spearman.high  # a shifted slope is a slope
    assert result.overlap_turned[1] > result.overlap.high


def test_turned_orders_are_the_symmetries_of_the_torus():
    for grid, count in (((4, 4), 8 * 16 - 1), ((3, 5), 4 * 15 - 1)):
        orders = turned_orders(grid)
        tokens = grid[0] * grid[1]
        assert len(orders) == count
        assert (np.sort(orders, axis=1) == np.arange(tokens)).all()
        assert not (orders == np.arange(tokens)).all(axis=1).any()


def test_a_planted_position_is_found():
    rng = np.random.default_rng(6)
    norms = rng.random((2, 300, 64))
    norms[:, ::2, 37] += 5  # at the top of every second image, whatever the time
    frequency, taken = concentration(top_tokens(norms), np.isfinite(norms), permutations=100)
    assert frequency.argmax() == 37 and frequency[37] == pytest.approx(0.55, abs=0.04)
    assert taken.value > taken.high
    even = compare_maps(norms[:, :150].mean(axis=(0, 1)), norms[:, 150:].mean(axis=(0, 1)), GRID)
    assert even.overlap.value > 0


def test_no_position_stands_out_of_random_maps():
    norms = np.random.default_rng(7).random((2, 300, 64))
    frequency, taken = concentration(top_tokens(norms), np.isfinite(norms), permutations=200)
    assert frequency.sum() == pytest.approx(6) and taken.low < taken.value < taken.high


def test_what_drawing_does_to_a_ranking_that_never_changes():
    assert fixed_ranking_overlap(64, 64) == 1
    # One token at the top of each subset: equal where the best of both is the same token.
    tokens, kept = 12, 6
    expected = sum((0.5 * comb(tokens - best - 1, kept - 1) / comb(tokens - 1, kept - 1)) ** 2 for best in range(7))
    assert fixed_ranking_overlap(tokens, kept, draws=20000) == pytest.approx(expected, abs=0.015)


def test_shares_of_the_top_tenth_and_their_ratio(seed):
    """Against counting: a position is at the top of an image where fewer than m values are larger."""
    rng = np.random.default_rng(seed)
    norms = rng.lognormal(size=(3, 40, 30)) * np.linspace(0.2, 3, 30)
    counts = np.zeros(30)
    for image in norms.reshape(-1, 30):
        for position, value in enumerate(image):
            counts[position] += (image > value).sum() < 3
    found = share_ratio(top_tokens(norms, 0.1), np.isfinite(norms), 50, seed)
    assert found.largest == pytest.approx(counts.max() / 120) and found.smallest == counts.min() / 120
    assert found.at_least == (counts.min() == 0)
    assert found.ratio.value == pytest.approx(counts.max() / max(counts.min(), 1))
    assert found.ratio.high < found.ratio.value
    assert found.interval[0] <= found.ratio.value <= found.interval[1]


def test_a_share_of_zero_makes_the_ratio_a_lower_bound():
    top = np.zeros((2, 10, 4), dtype=bool)
    top[:, :8, 1] = top[:, 8:, 2] = top[0, :3, 3] = True
    found = share_ratio(top, np.ones_like(top), 20)
    assert (found.largest, found.smallest, found.at_least) == (0.8, 0, True)
    assert found.ratio.value == pytest.approx(0.8 * 20)  # zero counts as one of 20 observations
    top[0, 0, 0] = True
    found = share_ratio(top, np.ones_like(top), 20)
    assert found.smallest == 1 / 20 and not found.at_least and found.ratio.value == pytest.approx(16)


def test_the_ratio_of_maps_of_chance_is_within_chance():
    rng = np.random.default_rng(0)
    inside = 0
    for number in range(20):
        norms = rng.random((2, 30, 16))
        found = share_ratio(top_tokens(norms, 0.1), np.isfinite(norms), 100, number)
        inside += found.ratio.low <= found.ratio.value <= found.ratio.high
    assert inside >= 16
