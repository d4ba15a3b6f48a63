"""The student: SiT backbone, token mixers, routing of token subsets, and projectors."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SiT": "sit",
        "SiTOutput": "sit",
        "PRESETS": ".config.presets",
        "draw_subset": "routing",
        "keep_count": "routing",
        "from_repa": ".checkpoints.conversion",
        "to_repa": ".checkpoints.conversion",
    },
)
