"""Frechet and kernel distance between two sets of features, in float64."""

from typing import NamedTuple

import numpy as np


class Moments(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64, and the number of rows."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int


def moments(features):
    """`Moments` of (n, D) features, n at least 2."""
    x = np.asarray(features, dtype=np.float64)
    return Moments(x.mean(axis=0), np.cov(x, rowvar=False).reshape(x.shape[1], -1), len(x))


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (FID, arXiv 1706.08500), with unbiased covariances.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2). That matrix is
    symmetric, so this needs no complex numbers and no iteration, and works for singular covariances. With fewer than
    D + 1 rows a covariance is singular and the distance is strongly biased upwards. This function does not check this;
    see `enough_for_covariance`.

    Args:
        a, b: (n, D) and (m, D) features, n and m at least 2; or their `Moments`.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    means = np.square(a.mean - b.mean).sum()
    return float(means + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def enough_for_covariance(count, dim):
    """True if a covariance of `count` rows in `dim` dimensions can have full rank."""
    return count > dim


def kernel_distance(a, b):
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 over all pairs (KID, arXiv 1801.01401, without subsets).

    Args:
        a, b: (n, D) and (m, D) features, n and m at least 2.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)

    def kernel(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        values = kernel(x, x)
        return (values.sum() - np.trace(values)) / (len(x) * (len(x) - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def kernel_distance_subsets(a, b, subsets=100, size=1000, seed=2020):
    """`kernel_distance` of random subsets, as KID is reported (arXiv 1801.01401): its mean and standard deviation.

    The subsets are those of torch-fidelity for the same seed.

    Args:
        a, b: (n, D) and (m, D) features.
        subsets: number of subsets.
        size: rows of each subset; it is reduced to n and m if they are smaller.
        seed: seed of the subsets.

    Returns:
        (mean, standard deviation over the subsets); (`kernel_distance`, 0) if every subset has all rows.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    size = min(size, len(a), len(b))
    if size == len(a) == len(b):
        return kernel_distance(a, b), 0.0
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        rows = rng.choice(len(a), size, replace=False)
        values.append(kernel_distance(a[rows], b[rng.choice(len(b), size, replace=False)]))
    return float(np.mean(values)), float(np.std(values))
