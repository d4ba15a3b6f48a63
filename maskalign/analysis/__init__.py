"""Measure the gradients of the alignment loss at the tokens, and how stable they are: the finding behind MaskAlign."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "analyze": "command",
        "AnalysisSettings": "settings",
        "cut_at_tap": "gradients",
        "token_gradients": "gradients",
        "trunk_gradients": "gradients",
        "measure_tokens": "measure",
        "measure_agreement": "agreement",
        "top_tokens": "stability",
        "overlap": "stability",
        "rank_correlation": "stability",
        "compare_maps": "stability",
        "compare_images": "stability",
    },
)
