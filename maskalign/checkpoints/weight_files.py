"""Files of weights: the .pt layouts of REPA and REG, and safetensors. Reading a file never runs code in it."""

import argparse
import json
import logging
import math
import os
import pickle
import struct
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import torch

from maskalign.checkpoints.conversion import METADATA_KEY, read_model, to_reg, to_repa
from maskalign.checkpoints.origins import read_origin
from maskalign.checkpoints.sources import ENDINGS
from maskalign.checkpoints.spec import ModelInfo
from maskalign.config.presets import SIZES
from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import replacing

log = logging.getLogger(__name__)


def read_file(path):
    """Read a file of weights.

    A .pt file may contain only tensors, plain containers, and an argparse.Namespace as in REPA's files.

    Returns:
        The dict in a .pt file, or {"ema": state dict, "steps", "facts", "path"} of a .safetensors file.

    Raises:
        UsageError: the file does not exist, is not readable, or contains other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    if path.suffix not in ENDINGS:
        raise UsageError(f"{path}: cannot tell what this is; give a .pt or .safetensors file, or a run folder")
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_pickle(path):
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for a damaged file torch also raises an error
            # The file is mapped, so that the optimizer's state is not read if only the weights are used.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        text = str(error)
        if "nsupported" in text or "GLOBAL" in text or "not an allowed" in text:
            raise UsageError(
                f"{path}: refused, because it holds more than tensors and plain settings and could run code "
                f"({_offender(text)}); ask for a file of weights alone"
            ) from None
        raise UsageError(f"{path}: not a readable checkpoint, it is damaged or something else") from None
    except Exception:  # for a damaged file torch, pickle and zipfile raise many types of errors
        raise UsageError(f"{path}: not a readable checkpoint, it is damaged or something else") from None
    if not isinstance(checkpoint, dict):
        raise UsageError(f"{path}: holds a {type(checkpoint).__name__}, not a dict of weights")
    return checkpoint


def _offender(text):
    """The name of the rejected object, from torch's message of many lines."""
    for line in text.splitlines():
        _, found, rest = line.partition("GLOBAL ")
        if found:
            return rest.split()[0]
    return "a pickled object"


def _read_safetensors(path):
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            state_dict = {name: file.get_tensor(name) for name in file.keys()}
            notes = file.metadata() or {}
        noted = json.loads(notes.get(METADATA_KEY, "{}"))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UsageError(f"{path}: not a readable .safetensors file ({one_line(error)})") from None
    if not isinstance(noted, dict):
        noted = {}
    model_notes = noted.pop("model", None)
    checkpoint = {"ema": NotedDict(state_dict), "steps": noted.get("steps"), "facts": noted.get("facts")}
    if METADATA_KEY in notes:
        checkpoint["path"] = noted.get("path", "linear")
    if isinstance(model_notes, dict):
        checkpoint["ema"]._metadata = {METADATA_KEY: model_notes}
    return checkpoint


class NotedDict(dict):
    """A dict that can carry `_metadata`, as torch's state dicts do."""


def read_info(checkpoint, model, name="", ema=True):
    """The information about a model in a file.

    Args:
        checkpoint: the dict from `read_file`.
        model: the `SiT` with these weights.
        name: name of the model.
        ema: True if the model has the averaged weights.

    Returns:
        ModelInfo; class_names, latent, vae and teachers are known only for files that maskalign has exported.

    Raises:
        UsageError: the file's notes do not fit its weights.
    """
    steps, notes = checkpoint.get("steps"), checkpoint.get("facts")
    known = _known_notes(notes)
    if isinstance(notes, dict) and notes.get("latent") is not None and "latent" not in known:
        raise UsageError(f"the file's notes on its latents are {notes['latent']!r}, without a scale and a bias")
    names = known.get("class_names")
    if names is not None and len(names) != model.num_classes:
        raise UsageError(f"the file's notes name {len(names)} classes, but its weights are for {model.num_classes}")
    steps = steps if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0 else None
    return ModelInfo(name, steps, ema, read_origin(checkpoint).path, **known)


def _known_notes(notes):
    """The valid entries of a file's notes about its model; files of other programs may contain anything."""

    def texts(value):
        return isinstance(value, list) and all(isinstance(entry, str) for entry in value)

    def number(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def latent(value):
        if not isinstance(value, dict) or not all(map(number, (value.get("scale"), value.get("bias")))):
            return False
        statistics = [value[key] for key in ("mean", "std") if value.get(key) is not None]
        good = all(isinstance(values, list) and all(map(number, values)) for values in statistics)
        return value["scale"] != 0 and good and len(statistics) != 1

    kinds = {"class_names": texts, "teachers": texts, "latent": latent, "vae": lambda value: isinstance(value, str)}
    notes = notes if isinstance(notes, dict) else {}
    return {key: notes[key] for key, is_kind in kinds.items() if key in notes and is_kind(notes[key])}


def load_file(path, ema=True, **settings):
    """Load the model from a .pt of REPA, REG or SiT, or from a .safetensors file.

    Args:
        path: the file.
        ema: load the moving average of the weights; if a file has only one set of weights, it is loaded.
        settings: as for `from_repa`.

    Returns:
        (SiT in eval mode, ModelInfo).

    Raises:
        HeadsUnknown: `heads` is required.
        UsageError: the file cannot be read, or is not such a file.
    """
    models, info, _ = load_sets(path, ("ema" if ema else "model",), **settings)
    (model,) = models.values()
    return model.eval().requires_grad_(False), info


def load_sets(path, kinds, published=None, **settings):
    """Load several sets of weights from a file.

    Args:
        path: as for `load_file`.
        kinds: the sets to load, of `ema` and `model`.
        published: `sources.Published` of a known file, which gives the layout.
        settings: as for `from_repa`.

    Returns:
        ({kind: SiT}, ModelInfo of the first kind, the dict as from `read_file`).
    """
    checkpoint = read_file(path)
    if published is not None:
        settings["layout"] = published.layout
    try:
        found = {kind: read_model(checkpoint, weights=kind, **settings) for kind in kinds}
        models = {kind: model for kind, (model, _) in found.items()}
        info = read_info(checkpoint, models[kinds[0]], Path(path).stem, kinds[0] == "ema")
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from None
    doubt = found[kinds[0]][1]
    if published is not None:
        info = replace(info, vae=info.vae or published.vae)
    elif doubt:
        log.warning("%s: %s", path, doubt)
    return models, info, checkpoint


def repa_checkpoint(model, ema, steps=0, path="linear", opt=None):
    """The dict that REPA's train.py saves and resumes from.

    Args:
        model, ema: `SiT`s with the weights and the averaged weights.
        steps: number of optimizer steps done.
        path: the interpolant's path, for `args`.
        opt: state of REPA's AdamW; by default a new one, with which REPA's code can continue.

    Raises:
        UsageError: REPA's layout cannot hold the model.
    """
    return _whole_checkpoint(to_repa, model, ema, steps, path, opt)


def reg_checkpoint(model, ema, steps=0, path="linear", opt=None):
    """The dict that REG's train.py saves and resumes from. For arguments and errors see `repa_checkpoint`."""
    return _whole_checkpoint(to_reg, model, ema, steps, path, opt)


def _whole_checkpoint(layout, model, ema, steps, path, opt):
    weights, averaged = layout(model, strict=True), layout(ema, strict=True)
    if opt is None:
        group = dict(
            lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, foreach=None, maximize=False,
            capturable=False, differentiable=False, fused=None, decoupled_weight_decay=True,
            params=list(range(len(weights))),
        )  # fmt: skip
        opt = {"state": {}, "param_groups": [group]}
    preset = f"SiT-{_size_name(model)}/{model.patch_size}"
    args = argparse.Namespace(
        model=preset, num_classes=model.num_classes, encoder_depth=model.align_depth, resolution=8 * model.input_size,
        path_type=path, prediction="v", qk_norm="blocks.0.attn.q_norm.weight" in weights, fused_attn=True, legacy=False,
    )  # fmt: skip
    return {"model": weights, "ema": averaged, "opt": opt, "args": args, "steps": steps}


def _size_name(model):
    same = (name for name, size in SIZES.items() if (size["depth"], size["width"]) == (model.depth, model.width))
    return next(same, f"{model.depth}x{model.width}")


def write_repa(path, checkpoint):
    """Write the dict from `repa_checkpoint` or `reg_checkpoint` to a .pt file, completely or not at all."""
    _write(path, lambda temporary: torch.save(checkpoint, temporary))


def write_safetensors(path, model, info=None):
    """Write one set of weights under our names to a .safetensors file that `load_file` reads, completely or not at all.

    Args:
        path: the file.
        model: `SiT`.
        info: `ModelInfo`; everything except the name and `ema` is written. By default nothing is known, and the
            interpolant's path is linear.

    Raises:
        RunError: the file cannot be written.
    """
    from safetensors.torch import save_file

    info = info or ModelInfo()
    weights = to_repa(model)
    notes = {"steps": info.step, "path": info.path, "model": weights._metadata[METADATA_KEY]}
    notes["facts"] = _known_notes(vars(info))
    tensors = {name: value.contiguous() for name, value in weights.items()}
    _write(path, lambda temporary: save_file(tensors, temporary, {"format": "pt", METADATA_KEY: json.dumps(notes)}))


def _write(path, write):
    """Let `write` write the file under a temporary name, rename it, and give it the permissions of a new file."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            Path(temporary).touch()
            mode = os.stat(temporary).st_mode & 0o777  # safetensors writes files that only their owner can read
            write(temporary)
            os.chmod(temporary, mode)
    except Exception as error:
        # torch and safetensors report a full disk with their own types of errors.
        if isinstance(error, UsageError):
            raise
        raise RunError(f"{path}: cannot be written ({disk_text(error)}); free space, or write elsewhere") from None


def disk_text(error):
    """The cause of an error with a file in a few words, without its temporary name."""
    cause = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return one_line((cause.strerror or cause) if cause is not None else error)
