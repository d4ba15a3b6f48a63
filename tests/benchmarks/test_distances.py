"""The distances against closed forms and sums written out."""

import numpy as np
import pytest

from benchmarks.distances import frechet_distance, kernel_distance


def with_moments(mean, deviations, count=64):
    """Samples whose mean and (diagonal, unbiased) covariance are exactly the given ones."""
    x = np.random.default_rng(0).standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * np.asarray(deviations) + np.asarray(mean)


def test_frechet_distance_of_diagonal_gaussians():
    a, b = with_moments([0, 1, 2], [1, 2, 3]), with_moments([1, 1, 0], [2, 2, 0.5], 50)
    # |mu|^2 + sum of (s - s')^2
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 6.25, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9) and frechet_distance(b, a) == frechet_distance(a, b)


def test_frechet_distance_with_fewer_samples_than_features():
    x = np.random.default_rng(1).standard_normal((4, 9))
    assert frechet_distance(x, x + 2) == pytest.approx(9 * 4, rel=1e-6)


def test_kernel_distance_is_the_sum_over_pairs():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1

    def kernel(x, y):
        return (float(np.dot(x, y)) / 3 + 1) ** 3

    first = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    second = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    both = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(first + second - 2 * both, rel=1e-12)
