"""Find out from a checkpoint how it was trained: with the objective of REPA and REG, of SiT, or an unsupported one.

The weights of DiT, and of SiT with other objectives, have the same names and shapes as supported weights. They can be
distinguished only by the training arguments in the checkpoint (`args`).
"""

from argparse import Namespace
from dataclasses import dataclass
from typing import Optional

from maskalign.config.presets import PRESETS, preset_sizes
from maskalign.config.settings import PATHS
from maskalign.errors import UsageError

# SiT's names of the interpolant's path: GVP is sin(pi t / 2) x + cos(pi t / 2) eps with t = 1 at the data.
SIT_PATHS = {"Linear": "linear", "GVP": "cosine"}
PREDICTIONS = {"v": "repa", "velocity": "sit"}
SAY = "choose a checkpoint that predicts velocities on a linear or cosine path"


@dataclass(frozen=True)
class Origin:
    """The information in a checkpoint about its training.

    Attributes:
        layout: `repa` (also for REG), `sit` (opposite direction of time), or None if the weights' shapes must decide.
        path: the interpolant's path, `linear` or `cosine`.
        heads, align_depth, num_classes: numbers, or None.
        sizes: depth, width and patch_size of the preset that `args` names, or {}.
        stated: True if the checkpoint says how it was trained.
    """

    layout: Optional[str]
    path: str
    heads: Optional[int]
    align_depth: Optional[int]
    num_classes: Optional[int]
    sizes: dict
    stated: bool

    def doubt(self, predicts_variance):
        """A warning about a checkpoint that does not say how it was trained; None for one that does."""
        if self.stated:
            return None
        taken = "an official SiT's, with t = 1 at the data" if predicts_variance else "REPA's or REG's"
        return (
            f"the file holds weights alone and does not say how they were trained; they are read as {taken}, linear "
            "path, velocity prediction; weights of a DiT, or of another path or prediction, would draw only noise"
        )


def read_origin(checkpoint):
    """The `Origin` of a whole checkpoint, a state dict, or a dict from `weight_files.read_file`.

    Raises:
        UsageError: the objective cannot be converted to a velocity model, or `args` is damaged.
    """
    args = checkpoint.get("args") if isinstance(checkpoint, dict) else None
    args = vars(args) if isinstance(args, Namespace) else args
    if args is not None and not isinstance(args, dict):
        raise UsageError(
            f"the checkpoint's args are a {type(args).__name__}, not settings: it is damaged or of another program"
        )
    args = {} if args is None else args
    sizes = _preset(_text(args, "model"))
    layout, path = _objective(_text(args, "path_type"), _text(args, "prediction"))
    own = checkpoint.get("path") if isinstance(checkpoint, dict) else None
    if isinstance(own, str) or (own is not None and "facts" in checkpoint):
        if own not in PATHS:
            raise UsageError(f"the file's notes give the path {own!r}, which is not one of {', '.join(PATHS)}")
        layout, path = "repa", own
    return Origin(
        layout=layout,
        path=path or "linear",
        heads=sizes.pop("heads", None),
        align_depth=_number(args, "encoder_depth"),
        num_classes=_number(args, "num_classes"),
        sizes={name: sizes[name] for name in ("depth", "width", "patch_size") if name in sizes},
        stated=path is not None,
    )


def _objective(path_type, prediction):
    """(layout, path) from the arguments of REPA's or SiT's training, each None if it is not known."""
    if prediction is not None and prediction not in PREDICTIONS:
        raise UsageError(f"the model was trained to predict {prediction!r}, and not the velocity; {SAY}")
    layout = PREDICTIONS.get(prediction)
    if path_type is None:
        return layout, None
    if path_type in SIT_PATHS and layout != "repa":
        return "sit", SIT_PATHS[path_type]
    if path_type in PATHS and layout != "sit":
        return "repa", path_type
    if path_type in (*SIT_PATHS, *PATHS):
        raise UsageError(
            f"the checkpoint's args contradict each other: path_type {path_type} is not of a training that predicts "
            f"{prediction!r}"
        )
    raise UsageError(
        f"the model was trained on the path {path_type!r}, which is neither linear nor cosine (GVP); {SAY}"
    )


def _preset(model):
    """Sizes of the preset in `args.model`; {} for a SiT that is not a preset."""
    if model is None:
        return {}
    if not model.lower().startswith("sit"):
        raise UsageError(
            f"the checkpoint is of the model {model!r}, and not of a SiT: it predicts something else than a velocity, "
            f"and would draw noise; {SAY}"
        )
    return dict(preset_sizes(model)) if model in PRESETS else {}


def _text(args, name):
    value = args.get(name)
    if value is not None and not isinstance(value, str):
        raise UsageError(
            f"the checkpoint's args.{name} is {value!r}, which is not a name: it is damaged or of another program"
        )
    return value


def _number(args, name):
    value = args.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(
            f"the checkpoint's args.{name} is {value!r}, which is not a whole number of at least 1: it is damaged"
        )
    return value
