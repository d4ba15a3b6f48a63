"""The student: SiT backbone, token mixers, routing of token subsets, and projectors."""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.config.schedules import keep_count as keep_count
    from maskalign.models.routing import draw_subset as draw_subset
    from maskalign.models.sit import SiT as SiT
    from maskalign.models.sit import SiTOutput as SiTOutput

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "SiT": "sit",
        "SiTOutput": "sit",
        "PRESETS": ".config.presets",
        "draw_subset": "routing",
        "keep_count": ".config.schedules",
        "from_repa": ".checkpoints.conversion",
        "to_repa": ".checkpoints.conversion",
    },
)
