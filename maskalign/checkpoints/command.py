"""The work of `maskalign convert`."""

from pathlib import Path

from maskalign.checkpoints.conversion import from_repa, pick_weights, to_repa
from maskalign.checkpoints.loading import load
from maskalign.checkpoints.weight_files import describe, read_file, repa_checkpoint, write_repa, write_safetensors
from maskalign.errors import UsageError

LAYOUTS = {".pt": "repa", ".pth": "repa", ".safetensors": "safetensors"}


def convert(src, dst, to=None, weights="ema"):
    """Convert a checkpoint.

    Args:
        src: a run or checkpoint of ours, a .pt in REPA's or SiT's layout, or a .safetensors file.
        dst: the file to write.
        to: `repa` or `safetensors`; by the ending of dst where it is None.
        weights: `ema` or `model`, the set that safetensors holds; REPA's layout holds both.

    Returns:
        A line that says what was written.

    Raises:
        UsageError: src cannot be read, or the layout cannot hold it. RunError: dst cannot be written.
    """
    src, dst = Path(src), Path(dst)
    to = to or LAYOUTS.get(dst.suffix)
    if to not in ("repa", "safetensors"):
        raise UsageError(f"{dst}: cannot tell the layout from its ending; add --to repa or --to safetensors")
    if dst.is_dir():
        raise UsageError(f"{dst} is a folder; name the file to write")
    if src.exists() and dst.exists() and src.samefile(dst):
        raise UsageError(f"{dst} is the file to read; write another one")
    models, about, opt = _read_both(src, both=to == "repa", weights=weights)
    chosen = models[weights]
    if to == "repa":
        checkpoint = repa_checkpoint(models["model"], models["ema"], about["step"] or 0, about["path"], opt)
        write_repa(dst, checkpoint)
    else:
        write_safetensors(dst, chosen, about["step"], about["path"])
    million = sum(parameter.numel() for parameter in chosen.parameters()) / 1e6
    sizes = f"depth {chosen.depth}, width {chosen.width}, patch {chosen.patch_size}, {million:.1f} M parameters"
    return f"{dst}: {to}, {sizes}" + ("" if about["step"] is None else f", step {about['step']}")


def _read_both(src, both, weights):
    """({"model", "ema"}, about, optimiser's state or None); only the set `weights` unless `both`."""
    wanted = ("model", "ema") if both else (weights,)
    if src.is_dir():
        loaded = {kind: load(src, ema=kind == "ema") for kind in wanted}
        return {kind: one.model for kind, one in loaded.items()}, loaded[wanted[0]].about, None
    checkpoint = read_file(src)
    try:
        models = {kind: from_repa(checkpoint, weights=kind) for kind in wanted}
    except UsageError as error:
        raise UsageError(f"{src}: {error}") from None
    # REPA's moments are of use only to the very same weights, not to a SiT checkpoint that was turned round.
    same = all(to_repa(model).keys() == pick_weights(checkpoint, kind).keys() for kind, model in models.items())
    same = same and all(
        value.shape == pick_weights(checkpoint, kind)[name].shape
        for kind, model in models.items()
        for name, value in to_repa(model).items()
    )
    return models, describe(checkpoint), checkpoint.get("opt") if same else None
