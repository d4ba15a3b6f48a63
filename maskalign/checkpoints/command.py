"""The work of `maskalign convert`."""

from dataclasses import replace
from pathlib import Path

from maskalign.checkpoints.conversion import pick_weights, read_model, to_reg, to_repa
from maskalign.checkpoints.loading import load
from maskalign.checkpoints.sources import locate
from maskalign.checkpoints.weight_files import (
    load_sets,
    reg_checkpoint,
    repa_checkpoint,
    write_repa,
    write_safetensors,
)
from maskalign.errors import UsageError

LAYOUTS = ("repa", "reg", "safetensors")
# For .pt the layout depends on the model: REG's layout with a class token, otherwise REPA's.
ENDINGS = {".pt": "pt", ".pth": "pt", ".safetensors": "safetensors"}


def convert(src, dst, to=None, weights="ema", heads=None, input_size=None):
    """Convert a checkpoint.

    Args:
        src: a run or checkpoint of maskalign, a .pt in the layout of REPA, REG or SiT, a .safetensors file, or a name
            that `sources.locate` knows.
        dst: the file to write.
        to: `repa`, `reg` or `safetensors`. With None the ending of dst decides; for .pt the layout is REG's if the
            model has a class token, otherwise REPA's.
        weights: `ema` or `model`, the set of weights to write to safetensors; the layouts of REPA and REG have both.
        heads: number of attention heads, for a file that does not contain it and whose sizes are no preset's.
        input_size: new side of the latents (or pixels), e.g. 64 for weights of 256 px that continue at 512 px. The
            position embedding is resampled to the new grid.

    Returns:
        A line of text about the written file.

    Raises:
        UsageError: src cannot be read, or the layout cannot hold the model.
        RunError: dst cannot be written.
    """
    src, dst = Path(src), Path(dst)
    to = to or ENDINGS.get(dst.suffix)
    if to not in (*LAYOUTS, "pt"):
        raise UsageError(f"{dst}: cannot tell the layout from its ending; add --to repa, --to reg or --to safetensors")
    if dst.is_dir():
        raise UsageError(f"{dst} is a folder; name the file to write")
    if src.exists() and dst.exists() and src.samefile(dst):
        raise UsageError(f"{dst} is the file to read; write another one")
    models, info, raw = _read(src, ("model", "ema") if to != "safetensors" else (weights,), heads)
    resized = ""
    if input_size is not None and input_size != models[weights].input_size:
        before = models[weights].grid
        models = {kind: resize(model, input_size) for kind, model in models.items()}
        info = _resized_info(info, input_size)
        resized = "; position embedding resampled from {}x{} to {}x{} tokens".format(*before, *models[weights].grid)
    chosen = models[weights]
    if to == "pt":
        to = "repa" if chosen.class_dim is None else "reg"
    if to == "safetensors":
        write_safetensors(dst, chosen, info)
    else:
        names, whole = (to_reg, reg_checkpoint) if to == "reg" else (to_repa, repa_checkpoint)
        step, opt = info.step or 0, _optimizer(raw, models, names)
        write_repa(dst, whole(models["model"], models["ema"], step, info.path, opt))
    million = sum(parameter.numel() for parameter in chosen.parameters()) / 1e6
    sizes = f"depth {chosen.depth}, width {chosen.width}, {chosen.heads} heads, patch {chosen.patch_size}"
    sizes += f", {million:.1f} M parameters, {info.path} path"
    return f"{dst}: {to}, {sizes}" + ("" if info.step is None else f", step {info.step}") + resized


def resize(model, input_size):
    """The model for another input size, with its position embedding resampled to the new grid.

    Raises:
        UsageError: the mixer is token_mlp, the position embedding is not the fixed one, or the size is not a multiple
            of the patch size.
    """
    again, _ = read_model(to_repa(model), input_size=input_size)
    return again.train(model.training)


def _resized_info(info, input_size):
    if info.latent is None or not isinstance(info.latent.get("shape"), list):
        return info
    return replace(info, latent={**info.latent, "shape": [info.latent["shape"][0], input_size, input_size]})


def _read(src, wanted, heads):
    """({kind: model} for the `wanted` kinds, ModelInfo, the file's dict or None for a run)."""
    located = locate(src)
    if located.path.is_dir():
        loaded = {kind: load(src, ema=kind == "ema", heads=heads) for kind in wanted}
        return {kind: one.model for kind, one in loaded.items()}, loaded[wanted[0]].info, None
    return load_sets(located.path, wanted, published=located.published, heads=heads)


def _optimizer(checkpoint, models, names):
    """The optimizer's state in a file if it belongs to exactly the parameters that are written, else None.

    It cannot be used with other parameters.
    """
    if checkpoint is None:
        return None
    for kind, model in models.items():
        theirs = pick_weights(checkpoint, kind)
        ours = names(model)
        if ours.keys() != theirs.keys() or any(ours[name].shape != theirs[name].shape for name in ours):
            return None
    return checkpoint.get("opt")
