"""The training objective: interpolants, velocity loss, representation alignment, and their random draws."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Interpolant": "interpolant",
        "lognormal_time": "interpolant",
        "alignment_loss": "alignment",
        "Draws": "draws",
        "draw": "draws",
        "training_loss": "flow_matching",
        "Losses": "flow_matching",
        "sample_posterior": "flow_matching",
    },
)
