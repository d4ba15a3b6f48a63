"""The student: SiT backbone, token mixers, routing of token subsets, projectors, and conversion of checkpoints."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SiT": "sit",
        "SiTOutput": "sit",
        "PRESETS": "presets",
        "draw_subset": "routing",
        "keep_count": "routing",
        "from_repa": "convert",
        "to_repa": "convert",
    },
)
