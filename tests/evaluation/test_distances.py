"""The distances against closed forms, sums written out, and torch-fidelity on the same features."""

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from maskalign.evaluation import (
    density_coverage,
    frechet_distance,
    kernel_distance,
    kernel_distance_subsets,
    moments,
    precision_recall,
)


def with_moments(mean, deviations, count=64):
    """Samples whose mean and (diagonal, unbiased) covariance are exactly the given ones."""
    x = np.random.default_rng(0).standard_normal((count, len(mean)))
    x -= x.mean(axis=0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x * np.asarray(deviations) + np.asarray(mean)


def features(seed, *counts, dim=24):
    """Correlated features like a network's: one array per count, of distributions that overlap."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) / dim
    return [(rng.gamma(2, 1 + 0.1 * k, (n, dim)) + 0.1 * k) @ mix for k, n in enumerate(counts)]


def test_frechet_distance_of_diagonal_gaussians():
    a, b = with_moments([0, 1, 2], [1, 2, 3]), with_moments([1, 1, 0], [2, 2, 0.5], 50)
    # |mu|^2 + sum of (s - s')^2
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 1 + 0 + 6.25, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9) and frechet_distance(b, a) == frechet_distance(a, b)
    assert frechet_distance(moments(a), moments(b)) == frechet_distance(a, b)


def test_frechet_distance_of_gaussians_that_do_not_commute():
    """In two dimensions tr (A B)^(1/2) = sqrt(tr AB + 2 sqrt(det AB))."""
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    a, b = with_moments([0, 0], [1, 3]), with_moments([0, 0], [2, 0.5]) @ turn.T + [3, -1]
    first, second = np.diag([1.0, 9.0]), turn @ np.diag([4.0, 0.25]) @ turn.T
    cross = np.sqrt(np.trace(first @ second) + 2 * np.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    assert frechet_distance(a, b) == pytest.approx(10 + 10 + 4.25 - 2 * cross, rel=1e-9)


def test_frechet_distance_of_samples_of_two_known_gaussians():
    """The estimate goes to the closed form as the samples grow."""
    rng = np.random.default_rng(3)
    scale, shift = np.linspace(0.5, 2, 8), np.linspace(0, 1, 8)
    truth = np.square(shift).sum() + np.square(scale - 1).sum()
    a, b = rng.standard_normal((40_000, 8)), rng.standard_normal((40_000, 8)) * scale + shift
    assert frechet_distance(a, b) == pytest.approx(truth, rel=0.02)


def test_frechet_distance_with_fewer_samples_than_features():
    x = np.random.default_rng(1).standard_normal((4, 9))
    assert frechet_distance(x, x + 2) == pytest.approx(9 * 4, rel=1e-6)


def test_frechet_distance_does_not_lose_digits_far_from_the_origin():
    a, b = features(5, 300, 300)
    near = frechet_distance(a, b)
    assert frechet_distance(a + 1e4, b + 1e4) == pytest.approx(near, rel=1e-5)


def test_frechet_distance_is_torch_fidelitys():
    a, b = features(0, 200, 150)
    stats = [fid_features_to_statistics(torch.from_numpy(x)) for x in (a, b)]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert theirs > 0.01 and frechet_distance(a, b) == pytest.approx(theirs, rel=1e-8)


def test_kernel_distance_is_the_sum_over_pairs():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1

    def kernel(x, y):
        return (float(np.dot(x, y)) / 3 + 1) ** 3

    first = np.mean([kernel(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    second = np.mean([kernel(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    both = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(first + second - 2 * both, rel=1e-12)


def test_kernel_distance_of_known_distributions():
    """For N(0, 1) and N(m, 1), E (xy + 1)^3 = 1 + 3 E x E y + 3 E x^2 E y^2 + E x^3 E y^3; it is unbiased."""
    m = 0.7
    moments_of = [(0, 1, 0), (m, m**2 + 1, m**3 + 3 * m)]

    def mean_kernel(p, q):
        return 1 + 3 * p[0] * q[0] + 3 * p[1] * q[1] + p[2] * q[2]

    p, q = moments_of
    truth = mean_kernel(p, p) + mean_kernel(q, q) - 2 * mean_kernel(p, q)
    rng = np.random.default_rng(4)
    estimates = [kernel_distance(rng.normal(0, 1, (40, 1)), rng.normal(m, 1, (40, 1))) for _ in range(3000)]
    assert np.mean(estimates) == pytest.approx(truth, abs=4 * np.std(estimates) / np.sqrt(3000))


def test_kernel_distance_over_subsets_is_torch_fidelitys():
    a, b = features(1, 200, 150)
    theirs = kid_features_to_metric(
        torch.from_numpy(a), torch.from_numpy(b), kid_subsets=7, kid_subset_size=60, rng_seed=2020, verbose=False,
        kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1.0,
    )  # fmt: skip
    mean, deviation = kernel_distance_subsets(a, b, subsets=7, size=60)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9) and deviation > 0
    assert kernel_distance_subsets(a, b[:150], size=1000)[0] == pytest.approx(kernel_distance(a, b), abs=0.1)
    assert kernel_distance_subsets(b, b + 1) == (kernel_distance(b, b + 1), 0.0)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_are_torch_fidelitys(k):
    real, samples = features(2, 150, 100, dim=6)
    theirs = prc_features_to_metric(
        torch.from_numpy(samples), torch.from_numpy(real), prc_neighborhood=k, prc_batch_size=64, save_cpu_ram=False,
        verbose=False,
    )  # fmt: skip
    precision, recall = precision_recall(real, samples, k)
    assert 0 < precision < 1 and 0 < recall < 1
    assert precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_density_and_coverage_are_the_definition(monkeypatch):
    monkeypatch.setattr("maskalign.evaluation.manifolds.ROWS", 16)
    real, samples = features(3, 60, 50, dim=5)
    k = 4
    within = np.linalg.norm(real[:, None] - real[None], axis=-1)
    np.fill_diagonal(within, np.inf)
    radii = np.sort(within, axis=1)[:, k - 1]
    inside = np.linalg.norm(real[:, None] - samples[None], axis=-1) <= radii[:, None]  # (real, samples)
    density, coverage = density_coverage(real, samples, k)
    assert density == pytest.approx(inside.sum() / (k * len(samples))) and 0 < coverage < 1
    assert coverage == pytest.approx(inside.any(axis=1).mean())


def test_neighbors_of_equal_and_of_distant_sets():
    real, _ = features(4, 80, 1)
    assert precision_recall(real, real) == (1.0, 1.0) and density_coverage(real, real)[1] == 1.0
    assert precision_recall(real, real + 100) == (0.0, 0.0) and density_coverage(real, real + 100) == (0.0, 0.0)
    # One mode of two: what is drawn is real, and half of what is real is never drawn.
    both = np.concatenate([real, real + 100])
    assert precision_recall(both, real) == (1.0, 0.5) and density_coverage(both, real)[1] == 0.5
    with pytest.raises(ValueError, match="3-th nearest"):
        precision_recall(real[:3], real)
