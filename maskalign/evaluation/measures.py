"""Distances between two sets of features, and held-out losses, under the names in evaluation.json."""

import numpy as np

from maskalign.evaluation.distances import enough_for_covariance, frechet_distance, kernel_distance_subsets
from maskalign.evaluation.manifolds import density_coverage, precision_recall
from maskalign.evaluation.settings import METRICS

# Maximum number of images of each set for precision, recall, density and coverage, as in ADM's evaluator.
MOST_NEIGHBORS = 10_000


def distances(samples, reference, name, metrics=METRICS):
    """Compare samples with real images.

    Args:
        samples, reference: (n, D) and (m, D) features, numpy float32.
        name: name of the features, as in `frechet[name]`.
        metrics: the metrics to compute, of `settings.METRICS`.

    Returns:
        dict from `metric[name]` to number, in the order of the table.
    """
    found = {}
    if "frechet" in metrics:
        found["frechet"] = frechet_distance(samples, reference)
    if "kernel" in metrics:
        found["kernel"], found["kernel_std"] = kernel_distance_subsets(samples, reference)
    if "neighbors" in metrics:
        real, drawn = reference[:MOST_NEIGHBORS], samples[:MOST_NEIGHBORS]
        found["precision"], found["recall"] = precision_recall(real, drawn)
        found["density"], found["coverage"] = density_coverage(real, drawn)
    return {f"{metric}[{name}]": value for metric, value in found.items()}


def held_out_measures(by_time, gap):
    """Held-out losses under the names in evaluation.json and evaluation.csv.

    Args:
        by_time: from `losses_by_time`.
        gap: from `held_out_gap`.

    Returns:
        dict from name to number; the alignment loss on all tokens is minus the mean cosine.
    """
    found = {name: float(np.mean(values)) for name, values in by_time.items()}
    if "cosine" in found:
        found["align_loss"] = -found["cosine"]
    return {f"held_out_{name}": value for name, value in (found | gap).items()}


def bias_note(samples, reference, name, dim):
    """A note about a Frechet distance with too few images; None if there are enough."""
    count = min(samples, reference)
    if enough_for_covariance(count, dim):
        return None
    return f"frechet[{name}] is of {count} pictures in {dim} dimensions: singular covariance, number too large"
