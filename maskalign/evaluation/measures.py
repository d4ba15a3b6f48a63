"""Distances of one set of features from another, and held-out losses, under the names that evaluation.json has."""

import numpy as np

from maskalign.evaluation.distances import enough_for_covariance, frechet_distance, kernel_distance_subsets
from maskalign.evaluation.manifolds import density_coverage, precision_recall
from maskalign.evaluation.settings import METRICS

MOST_NEIGHBORS = 10_000  # pictures of either set for precision, recall, density and coverage, as ADM's evaluator


def distances(samples, reference, name, metrics=METRICS):
    """Measure samples against real pictures.

    Args:
        samples, reference: (n, D) and (m, D) features, numpy float32.
        name: of the features, as in `frechet[name]`.
        metrics: which (`settings.METRICS`).

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
    """Held-out losses under the names that evaluation.json and evaluation.csv have.

    Args:
        by_time: of `losses_by_time`. gap: of `held_out_gap`.

    Returns:
        dict from name to number; the alignment loss on all tokens is minus the mean cosine.
    """
    found = {name: float(np.mean(values)) for name, values in by_time.items()}
    if "cosine" in found:
        found["align_loss"] = -found["cosine"]
    return {f"held_out_{name}": value for name, value in (found | gap).items()}


def bias_note(samples, reference, name, dim):
    """A note on a Frechet distance of too few pictures; None where there are enough."""
    count = min(samples, reference)
    if enough_for_covariance(count, dim):
        return None
    return f"frechet[{name}] is of {count} pictures in {dim} dimensions: singular covariance, number too large"
