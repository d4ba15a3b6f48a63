"""Precision, recall, density and coverage: comparisons of two sets by nearest neighbors."""

import torch

ROWS = 1024  # rows of a block of distances; memory is ROWS x the size of the larger set, in float64


def precision_recall(real, samples, k=3):
    """Improved precision and recall (arXiv 1904.06991, equation 1).

    A set's manifold is the union of balls around its points. The radius of a ball is the distance to the k-th nearest
    other point.

    Args:
        real, samples: (n, D) and (m, D) features, arrays or tensors; n and m more than k.

    Returns:
        (precision, recall): the share of samples on the real images' manifold, and of real images on the samples'.
    """
    real, samples = _float64(real), _float64(samples)
    return _share_inside(samples, real, _radii(real, k)), _share_inside(real, samples, _radii(samples, k))


def density_coverage(real, samples, k=5):
    """Density and coverage (arXiv 2002.09797, equations 3 and 5).

    Args:
        real, samples: (n, D) and (m, D) features, arrays or tensors; n more than k.

    Returns:
        (density, coverage): density is the mean number of real balls that contain a sample, divided by k (about 1 for
        equal sets; can be larger); coverage is the share of real images whose ball contains a sample.
    """
    real, samples = _float64(real), _float64(samples)
    radii = _radii(real, k)
    inside = torch.zeros((), dtype=torch.float64, device=real.device)
    nearest = torch.full_like(radii, torch.inf)
    for part in samples.split(ROWS):
        distances = _squared(part, real)
        inside += (distances <= radii).sum()
        nearest = torch.minimum(nearest, distances.amin(dim=0))
    return float(inside) / (k * len(samples)), float((nearest <= radii).double().mean())


def _float64(x):
    return torch.as_tensor(x).to(torch.float64)


def _squared(x, y):
    """Squared distances (n, m) of the rows, at least 0."""
    return torch.addmm(y.square().sum(dim=1), x, y.T, alpha=-2).add_(x.square().sum(dim=1, keepdim=True)).clamp_(min=0)


def _radii(x, k):
    """(n,) squared distance from every row to its k-th nearest other row."""
    if len(x) <= k:
        raise ValueError(f"{len(x)} rows have no {k}-th nearest neighbor")
    radii = []
    for begin in range(0, len(x), ROWS):
        distances = _squared(x[begin : begin + ROWS], x)
        distances[torch.arange(len(distances)), begin + torch.arange(len(distances))] = torch.inf
        radii.append(distances.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(radii)


def _share_inside(x, centers, radii):
    return float(torch.cat([(_squared(part, centers) <= radii).any(dim=1) for part in x.split(ROWS)]).double().mean())
