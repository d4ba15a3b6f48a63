"""Sampling: ODE and SDE samplers, classifier-free guidance, and pictures of what a model draws."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "euler": "samplers",
        "heun": "samplers",
        "euler_maruyama": "samplers",
        "score_from_velocity": "samplers",
        "Guided": "guidance",
        "ImageNoise": "noise",
        "Network": "network",
        "StateLayout": "state",
        "Sampling": "settings",
        "generate": "drawing",
        "class_sheet": "drawing",
        "to_uint8": "pictures",
        "load_decoder": "pictures",
        "class_grid": "grids",
    },
)
