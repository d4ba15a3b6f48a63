"""What makes data sets: sources of images, building, teacher features and latents, checking, contact sheets.

Each function stands behind the command of its name (`maskalign data build` and so on).
"""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "build": "building",
        "check": "checking",
        "encode": "encoding",
        "show": "showing",
    },
)
