"""Evaluation: distances between a model's samples and real images, and losses on held-out images."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Moments": "distances",
        "moments": "distances",
        "frechet_distance": "distances",
        "kernel_distance": "distances",
        "kernel_distance_subsets": "distances",
        "precision_recall": "manifolds",
        "density_coverage": "manifolds",
        "velocity_and_cosine": "losses",
    },
)
