"""Subsets: counts, the samplers' promises, and gather and scatter against plain indexing."""

import pytest
import torch

from maskalign.config import keep_count
from maskalign.models.routing import SUBSET_SAMPLERS, Fuse, draw_subset, gather_tokens, scatter_tokens


@pytest.mark.parametrize(
    "ratio, tokens, multiple, expected",
    [(0.5, 256, 8, 128), (0.25, 256, 8, 64), (1.0, 49, 8, 49), (0.5, 49, 8, 24), (0.01, 256, 8, 8), (0.99, 49, 8, 48)]
    + [(0.5, 144, 8, 72), (0.3, 64, 1, 19), (0.999, 4, 8, 4)],
)
def test_keep_count(ratio, tokens, multiple, expected):
    assert keep_count(ratio, tokens, multiple) == expected


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01, float("nan")])
def test_keep_count_refuses(ratio):
    with pytest.raises(ValueError, match="keep_ratio"):
        keep_count(ratio, 64)


@pytest.mark.parametrize("sampler", SUBSET_SAMPLERS)
@pytest.mark.parametrize("grid", [(16, 16), (7, 9), (1, 5), (14, 14)])
def test_subsets_are_sorted_distinct_and_seeded(sampler, grid, seed):
    tokens = grid[0] * grid[1]
    for count in {0, 1, tokens // 2, tokens - 1, tokens}:
        subset = draw_subset(5, grid, count, sampler, generator=torch.Generator().manual_seed(seed))
        again = draw_subset(5, grid, count, sampler, generator=torch.Generator().manual_seed(seed))
        assert subset.shape == (5, count) and subset.dtype == torch.int64
        assert torch.equal(subset, again)
        assert (subset.diff(dim=1) > 0).all()
        assert count == 0 or (0 <= subset.min() and subset.max() < tokens)


def test_uniform_keeps_every_token_equally_often(seed):
    subset = draw_subset(20_000, (4, 4), 4, generator=torch.Generator().manual_seed(seed))
    share = subset.flatten().bincount(minlength=16) / 20_000
    assert (share - 0.25).abs().max() < 6 * (0.25 * 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize("count", [16, 32, 48])
def test_grid_takes_an_equal_share_of_every_cell(count, seed):
    subset = draw_subset(50, (8, 8), count, "grid", generator=torch.Generator().manual_seed(seed))
    cell = subset // 8 // 2 * 4 + subset % 8 // 2
    for row in cell:
        assert (row.bincount(minlength=16) == count // 16).all()


def test_grid_spreads_the_remainder_over_cells(seed):
    subset = draw_subset(50, (8, 8), 24, "grid", generator=torch.Generator().manual_seed(seed))
    cell = subset // 8 // 2 * 4 + subset % 8 // 2
    counts = torch.stack([row.bincount(minlength=16) for row in cell])
    assert counts.min() == 1 and counts.max() == 2
    assert (counts.double().mean(0) - 1.5).abs().max() < 0.4  # no cell is always the one that gives two


def test_block_is_one_square(seed):
    subset = draw_subset(50, (16, 16), 25, "block", generator=torch.Generator().manual_seed(seed))
    rows, columns = subset // 16, subset % 16
    # The 25 tokens nearest to a center; at the edge of the grid the square is cut and grows inwards.
    assert (rows.amax(1) - rows.amin(1)).max() <= 7 and (columns.amax(1) - columns.amin(1)).max() <= 7
    apart = torch.maximum((rows[:, :, None] - rows[:, None]).abs(), (columns[:, :, None] - columns[:, None]).abs())
    assert ((apart == 1).sum(-1) >= 1).all()


def test_gather_and_scatter(seed):
    torch.manual_seed(seed)
    x, subset = torch.randn(3, 11, 5), draw_subset(3, (1, 11), 4)
    rows = gather_tokens(x, subset)
    assert torch.equal(rows, torch.stack([x[b, subset[b]] for b in range(3)]))
    back = scatter_tokens(x, subset, -rows)
    expected = x.clone()
    for b in range(3):
        expected[b, subset[b]] *= -1
    assert torch.equal(back, expected)


def test_fuse_fills_dropped_tokens_with_the_mask_token(seed):
    torch.manual_seed(seed)
    fuse, before, subset = Fuse(6).double(), torch.randn(2, 9, 6).double(), draw_subset(2, (3, 3), 4)
    torch.nn.init.normal_(fuse.mask_token)
    deep = torch.randn(2, 4, 6).double()
    out = fuse(before, deep, subset)
    weight, bias = fuse.linear.weight, fuse.linear.bias
    for b in range(2):
        for n in range(9):
            place = (subset[b] == n).nonzero()
            row = deep[b, place.item()] if len(place) else fuse.mask_token
            torch.testing.assert_close(out[b, n], weight @ torch.cat([before[b, n], row]) + bias)
