"""Weights in REPA's layout and back, and from official SiT checkpoints.

Parameter names are the same on both sides, so this file reads sizes off shapes, and turns time round where a checkpoint
runs it the other way.
"""

import math
import re
from collections import OrderedDict

import torch

from maskalign.errors import UsageError
from maskalign.models.presets import SIZES
from maskalign.models.sit import SiT

# Modules that REPA's SiT does not have.
OWN_MODULES = ("mixer.", "fuse.")
METADATA_KEY = "maskalign"


def from_repa(state_dict, *, num_heads=None, align_depth=None, mixer=None, weights="ema", layout="auto", **settings):
    """A model with the weights of a REPA checkpoint, its sizes read off the shapes.

    What shapes do not tell comes from, in this order: the arguments, what `to_repa` noted, the checkpoint's `args`
    (encoder_depth), the preset of that width; outside the presets heads are 64 wide, and the tap is after a third of
    the blocks.

    Args:
        state_dict: a state dict, or the whole dict of a REPA checkpoint (`model`, `ema`, `args`...).
        num_heads: attention heads.
        align_depth: the block that is aligned, counted from 1.
        mixer: kind of a mixer to add where the weights have none; a fresh one is the identity.
        weights: `ema` or `model`, which weights of a whole checkpoint to take.
        layout: `repa`; `sit` for official SiT checkpoints, in which t = 1 is data; `auto` takes a checkpoint that
            predicts twice its input channels (learn_sigma) for one of SiT's.
        settings: other arguments of `SiT`, e.g. route, restore, attention.

    Returns:
        SiT in the weights' dtype, in training mode as torch makes it.

    Raises:
        UsageError: not the weights of a SiT, or settings that do not fit them.
    """
    if layout not in ("auto", "repa", "sit"):
        raise ValueError(f"layout must be auto, repa or sit, got {layout!r}")
    args = state_dict.get("args")
    state_dict = pick_weights(state_dict, weights)
    noted = (getattr(state_dict, "_metadata", None) or {}).get(METADATA_KEY, {})
    state_dict, encoder_depth = _plain_names(state_dict)
    sizes = read_sizes(state_dict)
    predicted = state_dict["final_layer.linear.weight"].shape[0] // sizes["patch_size"] ** 2
    if layout == "sit" or (layout == "auto" and predicted == 2 * sizes["in_channels"]):
        state_dict = _turn_time(state_dict, sizes)

    sizes.update(noted)
    if encoder_depth or getattr(args, "encoder_depth", None):
        sizes["align_depth"] = encoder_depth or args.encoder_depth
    if num_heads is not None:
        sizes["heads"] = num_heads
    if align_depth is not None:
        sizes["align_depth"] = align_depth
    fresh = []
    if mixer is not None and mixer != sizes["mixer"]:
        if sizes["mixer"] != "none":
            raise UsageError(f"the weights have a mixer {sizes['mixer']!r}; it cannot be replaced by {mixer!r}")
        sizes["mixer"] = mixer
        fresh.append("mixer.")
    if settings.get("restore") == "fuse" and "fuse.linear.weight" not in state_dict:
        fresh.append("fuse.")
    try:
        model = SiT(**{**sizes, **settings})
    except ValueError as error:
        raise UsageError(f"the weights do not make a SiT: {error}") from None
    _load(model, state_dict, fresh)
    return model


def to_repa(model, *, strict=False):
    """A model's weights under REPA's names.

    Args:
        model: `SiT`.
        strict: only what REPA's own SiT can load. Otherwise the mixer and the fusion are kept under their own names,
            and `from_repa(to_repa(m))` is m for every model.

    Returns:
        OrderedDict of detached tensors that share memory with the model. Settings that shapes do not tell (heads,
        alignment depth, route) go along as its `_metadata`, which torch.save keeps and load_state_dict ignores.

    Raises:
        UsageError: with strict, a mixer that does something, a fusion, or a projector that is not REPA's.
    """
    source = model.state_dict()
    if strict:
        _require_repa(model, source)
        source = {name: value for name, value in source.items() if not name.startswith(OWN_MODULES)}
    out = OrderedDict((name, value.detach()) for name, value in source.items())
    noted = {
        "heads": model.heads,
        "align_depth": model.align_depth,
        "route": list(model.route) if model.route else "none",
        "restore": model.restore,
        "attention": model.blocks[0].attn.implementation,
    }
    if strict:
        noted["restore"] = "none" if model.restore == "fuse" else model.restore
    out._metadata = {METADATA_KEY: noted}
    return out


def is_identity(mixer):
    """Whether a mixer returns its input: its adaLN linear is zero, as at the start."""
    return all(not parameter.any() for name, parameter in mixer.named_parameters() if "adaLN_modulation" in name)


def pick_weights(checkpoint, weights="ema"):
    """The state dict in a whole checkpoint (`weights` is `ema` or `model`), or a state dict as it is.

    Raises:
        UsageError: where there is none.
    """
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UsageError(f"no weights: expected a dict of tensors, got {type(checkpoint).__name__}")
    nested = [name for name in ("ema", "model", "state_dict") if isinstance(checkpoint.get(name), dict)]
    if not nested:
        return checkpoint
    chosen = weights if weights in nested else nested[0] if len(nested) == 1 else None
    if chosen is None:
        raise UsageError(f"the checkpoint has no {weights!r} weights; it has {', '.join(nested)}")
    return checkpoint[chosen]


def read_sizes(state_dict):
    """The arguments of `SiT` that a state dict's names and shapes tell, and the presets' guess at the others.

    Raises:
        UsageError: not the weights of a SiT.
    """
    patch = _tensor(state_dict, "x_embedder.proj.weight", 4)
    positions = _tensor(state_dict, "pos_embed", 3)
    width, channels, patch_size, _ = patch.shape
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1] or patch.shape[2] != patch.shape[3]:
        raise UsageError(f"the weights are for {positions.shape[1]} tokens, which is not a square grid")
    depth = _count(state_dict, r"blocks\.(\d+)\.")
    if depth == 0:
        raise UsageError("the weights have no blocks: not a SiT or REPA checkpoint")
    hidden = _tensor(state_dict, "blocks.0.mlp.fc1.weight", 2).shape[0]
    preset = next((size for size in SIZES.values() if size["width"] == width), None)
    sizes = dict(
        input_size=side * patch_size,
        patch_size=patch_size,
        in_channels=channels,
        num_classes=_tensor(state_dict, "y_embedder.embedding_table.weight", 2).shape[0] - 1,
        depth=depth,
        width=width,
        heads=preset["heads"] if preset else max(1, width // 64),
        # The model cuts width * mlp_ratio to a whole number, which must not fall one below.
        mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        qk_norm="blocks.0.attn.q_norm.weight" in state_dict,
        align_depth=min(depth, preset["align_depth"] if preset else max(1, round(depth / 3))),
        restore="fuse" if "fuse.linear.weight" in state_dict else "none",
    )
    _tensor(state_dict, "final_layer.linear.weight", 2)
    return {**sizes, **_projector_sizes(state_dict), **_mixer_sizes(state_dict)}


def _projector_sizes(state_dict):
    teachers = range(_count(state_dict, r"projectors\.(\d+)\."))
    if "projectors.0.conv.weight" in state_dict:
        dims = [_tensor(state_dict, f"projectors.{k}.conv.weight", 4).shape[0] for k in teachers]
        return {"projector": "conv", "teacher_dims": tuple(dims)}
    dims = tuple(_tensor(state_dict, f"projectors.{k}.4.weight", 2).shape[0] for k in teachers)
    hidden = {"projector_dim": _tensor(state_dict, "projectors.0.0.weight", 2).shape[0]} if dims else {}
    return {"projector": "mlp", "teacher_dims": dims, **hidden}


def _mixer_sizes(state_dict):
    if "mixer.fc1.weight" in state_dict:
        return {"mixer": "token_mlp", "mixer_hidden": _tensor(state_dict, "mixer.fc1.weight", 2).shape[0]}
    if "mixer.conv.weight" in state_dict:
        return {"mixer": "depthwise_conv"}
    return {"mixer": "attention" if "mixer.block.attn.qkv.weight" in state_dict else "none"}


def _plain_names(state_dict):
    """A state dict without wrappers' prefixes and REPA's early names; and the alignment depth those names tell.

    REPA's first checkpoints call the blocks after the tap `decoder_blocks`.
    """
    plain = {name.removeprefix("module."): value for name, value in state_dict.items()}
    if not any(name.startswith("decoder_blocks.") for name in plain):
        return plain, None
    encoder_depth = _count(plain, r"blocks\.(\d+)\.")

    def later(match):
        return f"blocks.{int(match.group(1)) + encoder_depth}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", later, name): value for name, value in plain.items()}, encoder_depth


def _turn_time(state_dict, sizes):
    """Official SiT's weights (t = 1 is data, 2C output channels) as ours: v(x, t) = -v_SiT(x, 1 - t), exactly.

    cos(w(1 - t)) and sin(w(1 - t)) are rotations of cos(wt) and sin(wt), so the first time linear absorbs the change of
    time, and the final linear the sign.
    """
    out = dict(state_dict)
    p, channels = sizes["patch_size"], sizes["in_channels"]
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state_dict[name].unflatten(0, (p, p, -1))
        # The channels after the first C are the variance that learn_sigma predicts; sampling never uses them.
        out[name] = -rows[:, :, :channels].flatten(0, 2)
    name = "t_embedder.mlp.0.weight"
    weight = state_dict[name]
    half = weight.shape[1] // 2
    frequency = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64, device=weight.device))
    cosine, sine = weight.double().split(half, dim=1)
    turned = torch.cat(
        [cosine * frequency.cos() + sine * frequency.sin(), cosine * frequency.sin() - sine * frequency.cos()], dim=1
    )
    out[name] = turned.to(weight.dtype)
    return out


def _load(model, state_dict, fresh):
    expected = model.state_dict()
    missing = [name for name in expected if name not in state_dict and not name.startswith(tuple(fresh))]
    unknown = [name for name in state_dict if name not in expected]
    if missing or unknown:
        what = f"lack {missing[0]}" if missing else f"have {unknown[0]}, which a SiT of these sizes has not"
        more = len(missing) + len(unknown) - 1
        raise UsageError(f"the weights {what}" + (f" (and {more} more names differ)" if more else ""))
    for name, value in state_dict.items():
        if value.shape != expected[name].shape:
            raise UsageError(
                f"the weights' {name} is {tuple(value.shape)}; a SiT of these sizes has {tuple(expected[name].shape)}"
            )
    model.to(state_dict["x_embedder.proj.weight"].dtype)
    model.load_state_dict(state_dict, strict=False)


def _require_repa(model, state_dict):
    if not is_identity(model.mixer):
        raise UsageError("REPA's layout has no place for a trained mixer; write safetensors instead (--to safetensors)")
    if model.restore == "fuse":
        raise UsageError("REPA's layout has no place for the fusion of restore=fuse; write safetensors instead")
    if "projectors.0.conv.weight" in state_dict:
        raise UsageError("REPA's layout has MLP projectors only; write safetensors instead")


def _tensor(state_dict, name, rank):
    value = state_dict.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != rank:
        raise UsageError(f"the weights have no {name} of {rank} dimensions: not a SiT or REPA checkpoint")
    return value


def _count(state_dict, pattern):
    """One more than the largest number that `pattern` finds at the start of a name."""
    found = [re.match(pattern, name) for name in state_dict if isinstance(name, str)]
    return max((int(match.group(1)) + 1 for match in found if match), default=0)
