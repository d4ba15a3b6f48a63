"""Resampling, normalizing and rounding of token grids, against numpy and against the definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskalign.errors import UsageError
from maskalign.teachers import normalize_tokens, quantize_rows, resample_tokens


def bilinear_by_hand(row, size):
    """1-D linear interpolation between pixel centers, edges held."""
    centers = (np.arange(size) + 0.5) * len(row) / size - 0.5
    return np.interp(np.clip(centers, 0, len(row) - 1), np.arange(len(row)), row)


def test_same_grid_is_the_same_tensor():
    z = torch.randint(-127, 128, (2, 6, 3), dtype=torch.int8)
    assert resample_tokens(z, (2, 3), (2, 3)) is z


def test_shrinking_takes_area_means_in_row_major_order(seed):
    torch.manual_seed(seed)
    z = torch.randn(2, 8 * 6, 5)
    small = resample_tokens(z, (8, 6), (4, 2))
    want = z.reshape(2, 4, 2, 2, 3, 5).mean(dim=(2, 4)).reshape(2, 8, 5)
    assert torch.allclose(small, want, atol=1e-6)


def test_growing_is_bilinear_between_centers(seed):
    generator = np.random.default_rng(seed)
    rows, columns = generator.normal(size=4), generator.normal(size=3)
    z = torch.tensor(np.outer(rows, columns)).reshape(1, 12, 1)
    large = resample_tokens(z, (4, 3), (7, 9)).reshape(7, 9).numpy()
    want = np.outer(bilinear_by_hand(rows, 7), bilinear_by_hand(columns, 9))
    assert np.allclose(large, want, atol=1e-12)


def test_one_axis_shrinks_while_the_other_grows():
    z = torch.arange(8.0).reshape(1, 8, 1)  # rows 0..3, columns 0..1
    out = resample_tokens(z, (4, 2), (2, 4)).reshape(2, 4)
    means = z.reshape(2, 2, 2).mean(dim=1).numpy()
    assert np.allclose(out, [bilinear_by_hand(row, 4) for row in means])


def test_resampling_commutes_with_removing_the_mean_token(seed):
    torch.manual_seed(seed)
    z, mean = torch.randn(2, 64, 5), torch.randn(5)
    for grid in ((16, 16), (4, 4), (5, 11)):
        first = resample_tokens(normalize_tokens(z, "mean", mean), (8, 8), grid)
        second = normalize_tokens(resample_tokens(z, (8, 8), grid), "mean", mean)
        assert torch.allclose(first, second, atol=1e-5)


def test_int8_comes_out_as_float32_when_resampled():
    z = torch.full((1, 4, 2), 100, dtype=torch.int8)
    out = resample_tokens(z, (2, 2), (4, 4))
    assert out.dtype == torch.float32 and (out == 100).all()


def test_a_grid_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a grid of 3x4"):
        resample_tokens(torch.zeros(1, 13, 2), (3, 4), (2, 2))


def test_spatial_normalization_is_irepas(seed):
    torch.manual_seed(seed)
    z = torch.randn(3, 16, 7, dtype=torch.float64) * 4 + 2
    got = normalize_tokens(z, "spatial").numpy()
    x = z.numpy()
    want = (x - x.mean(axis=1, keepdims=True)) / (x.std(axis=1, ddof=1, keepdims=True) + 1e-6)
    assert np.allclose(got, want, rtol=1e-10)
    constant = normalize_tokens(torch.ones(1, 4, 2), "spatial")
    assert torch.isfinite(constant).all() and constant.abs().max() == 0


@pytest.mark.parametrize(
    ("z", "mode", "words"),
    [
        (torch.zeros(1, 1, 2), "spatial", "at least 2 tokens"),
        (torch.zeros(1, 4, 2), "mean", "mean token"),
        (torch.zeros(1, 4, 2), "zscore", "'zscore'"),
    ],
)
def test_impossible_normalizations_are_refused(z, mode, words):
    with pytest.raises(UsageError, match=words):
        normalize_tokens(z, mode)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.floats(-30, 30), st.integers(0, 2**31))
def test_rounding_keeps_every_entry_within_half_a_step(rows, width, exponent, seed):
    generator = np.random.default_rng(seed)
    z = generator.standard_t(2, size=(rows, width)).astype(np.float32) * np.float32(2.0**exponent)
    q = quantize_rows(torch.from_numpy(z))
    assert q.dtype == torch.int8 and q.shape == z.shape
    largest = np.abs(z).max(axis=1, keepdims=True)
    steps = z.astype(np.float64) / largest * 127
    assert np.abs(q.numpy() - steps).max() <= 0.5 + 1e-4
    assert (np.abs(q.numpy()).max(axis=1) == 127).all()


def test_rounding_at_the_edges():
    tiny = torch.tensor([1e-45, -1e-45, 0.0])
    rows = torch.stack([torch.zeros(3), tiny, torch.tensor([3e38, -1.0, 0.0]), torch.tensor([1.0, -1.0, 0.5])])
    want = [[0, 0, 0], [127, -127, 0], [127, 0, 0], [127, -127, 64]]
    assert quantize_rows(rows).tolist() == want
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite"):
            quantize_rows(torch.tensor([[1.0, bad]]))
