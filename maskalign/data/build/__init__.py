"""Tools that create data sets: sources of images, building, teacher features and latents, checking, contact sheets.

Each function implements the command of the same name (`maskalign data build` and so on).
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
