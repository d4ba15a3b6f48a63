"""Sampling: ODE and SDE samplers, classifier-free guidance, and sheets of the drawn images."""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.sampling.drawing import generate as generate
    from maskalign.sampling.samplers import euler as euler
    from maskalign.sampling.samplers import euler_maruyama as euler_maruyama
    from maskalign.sampling.samplers import heun as heun
    from maskalign.sampling.settings import Sampling as Sampling

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
