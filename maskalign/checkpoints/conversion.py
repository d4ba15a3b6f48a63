"""Weights in the layouts of REPA and REG and back, and from official SiT checkpoints.

REPA's parameter names are ours. REG (arXiv 2507.01467) has other names for what embeds and predicts the class token,
and a row of zeros for it in front of its position embedding. Sizes are read off the shapes, and time is reversed where
a checkpoint runs it the other way.
"""

import math
import re
from collections import OrderedDict
from typing import Any, Dict, Mapping, Optional

import torch

from maskalign.config.presets import SIZES
from maskalign.errors import UsageError
from maskalign.models.sit import SiT

# Modules that neither REPA's nor REG's SiT has.
OWN_MODULES = ("mixer.", "fuse.")
# Our prefixes of what a class token adds, and REG's.
REG_NAMES = {
    "class_embedder.proj.": "cls_projectors2.",
    "class_embedder.norm.": "wg_norm.",
    "final_layer.class_linear.": "final_layer.linear_cls.",
}
CLASS_PARTS = ("class_embedder.", "final_layer.class_linear.")
# What compilation, DDP, FSDP and recomputation put into parameter names.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
METADATA_KEY = "maskalign"
NOTED = ("heads", "align_depth", "route", "restore", "attention")  # settings that shapes do not tell


def from_repa(
    state_dict: Mapping[str, Any],
    *,
    num_heads: Optional[int] = None,
    align_depth: Optional[int] = None,
    mixer: Optional[str] = None,
    mixer_layers: Optional[int] = None,
    class_dim: Optional[int] = None,
    weights: str = "ema",
    layout: str = "auto",
    **settings: Any,
) -> SiT:
    """A model with the weights of a REPA, REG or SiT checkpoint or of an export of ours, sizes read off the shapes.

    What shapes do not tell comes from, in this order: the arguments, the checkpoint's `args` (encoder_depth), what
    `to_repa` or `to_reg` noted, the preset of that width; outside the presets heads are 64 wide, and the tap is after a
    third of the blocks.

    Args:
        state_dict: a state dict, or the whole dict of a checkpoint (`model`, `ema`, `args`...). Prefixes that
            torch.compile, DDP and FSDP put into names are dropped.
        num_heads: attention heads.
        align_depth: the block that is aligned, counted from 1.
        mixer: kind of a mixer to add where the weights have none; a fresh one is the identity.
        mixer_layers: layers of the mixer `attention`, by default 2 fresh ones, or as many as the weights have; further
            ones are fresh.
        class_dim: width of a class token to add where the weights have none. Its parts are fresh, and unlike a mixer's
            they change what the model predicts: one more token is attended to.
        weights: `ema` or `model`, which weights of a whole checkpoint to take.
        layout: `repa` (also REG's); `sit` for official SiT checkpoints, in which t = 1 is data; `auto` takes a
            checkpoint that predicts twice its input channels (learn_sigma) for one of SiT's.
        settings: other arguments of `SiT`, e.g. route, restore, attention, and teacher_dims for weights that have no
            projectors.

    Returns:
        SiT in the weights' dtype, in training mode as torch makes it.

    Raises:
        UsageError: not the weights of a SiT, or settings that do not fit them.
    """
    if layout not in ("auto", "repa", "sit"):
        raise ValueError(f"layout must be auto, repa or sit, got {layout!r}")
    args = state_dict.get("args") if isinstance(state_dict, dict) else None
    state_dict = pick_weights(state_dict, weights)
    noted = (getattr(state_dict, "_metadata", None) or {}).get(METADATA_KEY, {})
    noted = {name: noted[name] for name in NOTED if name in noted}  # a file from elsewhere may hold anything
    state_dict, encoder_depth = _own_names(state_dict)
    sizes = read_sizes(state_dict)
    predicted = state_dict["final_layer.linear.weight"].shape[0] // sizes["patch_size"] ** 2
    if layout == "sit" or (layout == "auto" and predicted == 2 * sizes["in_channels"]):
        state_dict = _turn_time(state_dict, sizes)

    sizes.update(noted)
    encoder_depth = encoder_depth or getattr(args, "encoder_depth", None)
    if encoder_depth:
        sizes["align_depth"] = encoder_depth
    if num_heads is not None:
        sizes["heads"] = num_heads
    if align_depth is not None:
        sizes["align_depth"] = align_depth
    fresh = _fresh_mixer(sizes, mixer, mixer_layers) + _fresh_class_token(sizes, class_dim)
    if settings.get("restore") == "fuse" and "fuse.linear.weight" not in state_dict:
        fresh.append("fuse.")
    if not sizes["teacher_dims"]:
        fresh.append("projectors.")  # where `settings` names teachers
    try:
        model = SiT(**{**sizes, **settings})
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UsageError(f"the weights do not make a SiT: {error}") from None
    _load(model, state_dict, fresh)
    return model


def from_reg(state_dict: Mapping[str, Any], **settings: Any) -> SiT:
    """A model with the weights of a REG checkpoint, as `from_repa` reads them; without a class token they are refused.

    Args:
        state_dict: a state dict, or the whole dict of a checkpoint.
        settings: those of `from_repa`. With `class_dim` the weights may also be REPA's or SiT's.

    Raises:
        UsageError: weights without a class token, or what `from_repa` raises.
    """
    own, _ = _own_names(pick_weights(state_dict, settings.get("weights", "ema")))
    if "class_embedder.proj.weight" not in own and settings.get("class_dim") is None:
        raise UsageError(
            "the weights have no class token, so they are REPA's or SiT's: use from_repa, or add a class token with "
            "class_dim"
        )
    return from_repa(state_dict, **settings)


def to_repa(model: SiT, *, strict: bool = False) -> Dict[str, torch.Tensor]:
    """A model's weights under REPA's names.

    Args:
        model: `SiT`.
        strict: only what REPA's own SiT can load. Otherwise the mixer, the fusion and the class token's parts are kept
            under their own names, and `from_repa(to_repa(m))` is m for every model.

    Returns:
        OrderedDict of detached tensors that share memory with the model. Settings that shapes do not tell (heads,
        alignment depth, route) go along as its `_metadata`, which torch.save keeps and load_state_dict ignores.

    Raises:
        UsageError: with strict, a mixer that does something, a class token, a fusion, or projectors not REPA's.
    """
    source = model.state_dict()
    if strict:
        if model.class_dim is not None:
            raise UsageError("REPA's layout has no place for a class token; write REG's instead (--to reg)")
        source = _strict(model, source, "REPA")
    return _noted(model, source)


def to_reg(model: SiT, *, strict: bool = False) -> Dict[str, torch.Tensor]:
    """The weights of a model with a class token under REG's names, in REG's order.

    Args:
        model: `SiT` with a class token.
        strict: only what REG's own SiT can load. Otherwise the mixer and the fusion are kept under their own names, and
            `from_reg(to_reg(m))` is m for every model with a class token.

    Returns:
        OrderedDict as from `to_repa`; `pos_embed` is (1, 1 + N, D) with a first row of zeros.

    Raises:
        UsageError: a model without a class token; with strict, a mixer that does something, a fusion, projectors that
            are not REG's, or a class token of another width than the first teacher's rows.
    """
    if model.class_dim is None:
        raise UsageError(
            "REG's layout is for models with a class token, and this one has none; write REPA's (--to repa)"
        )
    source = model.state_dict()
    if strict:
        source = _strict(model, source, "REG")
        if model.teacher_dims[:1] != (model.class_dim,):
            raise UsageError(
                "REG's layout has a class token as wide as the first teacher's rows, but here it has "
                f"{model.class_dim} numbers and the teachers have {list(model.teacher_dims)}; "
                "write safetensors instead (--to safetensors)"
            )
    renamed = {}
    for name, value in source.items():
        prefix = next((own for own in REG_NAMES if name.startswith(own)), None)
        renamed[name if prefix is None else REG_NAMES[prefix] + name.removeprefix(prefix)] = value
    position = renamed["pos_embed"]
    renamed["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
    # REG's own order, by which the state of its optimizer counts.
    last = ("projectors.", "final_layer.", "cls_projectors2.", "wg_norm.", *OWN_MODULES)

    def place(name):
        return next((number for number, prefix in enumerate(last, 1) if name.startswith(prefix)), 0)

    return _noted(model, {name: renamed[name] for name in sorted(renamed, key=place)})


def _strict(model, source, layout):
    """The part of a state dict that REPA's or REG's own code can load."""
    if not is_identity(model.mixer):
        raise UsageError(
            f"{layout}'s layout has no place for a trained mixer; write safetensors instead (--to safetensors)"
        )
    if model.restore == "fuse":
        raise UsageError(f"{layout}'s layout has no place for the fusion of restore=fuse; write safetensors instead")
    if "projectors.0.conv.weight" in source:
        raise UsageError(f"{layout}'s layout has MLP projectors only; write safetensors instead")
    return {name: value for name, value in source.items() if not name.startswith(OWN_MODULES)}


def _noted(model, source):
    """Detached weights, with the settings that shapes do not tell."""
    out = OrderedDict((name, value.detach()) for name, value in source.items())
    route = list(model.route) if model.route else "none"
    attention = model.blocks[0].attn.implementation
    noted = dict(zip(NOTED, (model.heads, model.align_depth, route, model.restore, attention), strict=True))
    setattr(out, "_metadata", {METADATA_KEY: noted})  # noqa: B010  torch's own attribute, unknown to type checkers
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
        raise UsageError("the weights have no blocks: not a SiT, REPA or REG checkpoint")
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
    return {**sizes, **_projector_sizes(state_dict), **_mixer_sizes(state_dict), **_class_sizes(state_dict)}


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
    layers = _count(state_dict, r"mixer\.layers\.(\d+)\.")
    return {"mixer": "attention", "mixer_layers": layers} if layers else {"mixer": "none"}


def _class_sizes(state_dict):
    if "class_embedder.proj.weight" not in state_dict:
        return {"class_dim": None}
    return {"class_dim": _tensor(state_dict, "class_embedder.proj.weight", 2).shape[1]}


def _fresh_mixer(sizes, mixer, layers):
    """Enter a mixer that was asked for into `sizes`; prefixes of parameters that the weights may then lack."""
    there = sizes["mixer"]
    if mixer is not None and there not in ("none", mixer):
        raise UsageError(f"the weights have a mixer {there!r}; it cannot be replaced by {mixer!r}")
    sizes["mixer"] = mixer or there
    if layers is None:
        return ["mixer."] if sizes["mixer"] != there else []
    if sizes["mixer"] != "attention":
        raise UsageError(f"mixer_layers goes with the mixer attention, and here the mixer is {sizes['mixer']!r}")
    known = sizes.get("mixer_layers", 0)
    if layers < known:
        raise UsageError(f"the weights have {known} mixing layers, which cannot become {layers}")
    sizes["mixer_layers"] = layers
    return [f"mixer.layers.{number}." for number in range(known, layers)]


def _fresh_class_token(sizes, class_dim):
    """The same for a class token."""
    there = sizes["class_dim"]
    if class_dim is None or class_dim == there:
        return []
    if there is not None:
        raise UsageError(f"the weights have a class token of {there} numbers, which cannot become {class_dim}")
    sizes["class_dim"] = class_dim
    return list(CLASS_PARTS)


def _own_names(state_dict):
    """A state dict under our names, and the alignment depth that REPA's early names tell.

    REPA's first checkpoints call the blocks after the tap `decoder_blocks`; ours once had a single mixing layer, called
    `mixer.block`.
    """
    own = {WRAPPERS.sub("", name) if isinstance(name, str) else name: value for name, value in state_dict.items()}
    own = {own_name(name) if isinstance(name, str) else name: value for name, value in own.items()}
    if "class_embedder.proj.weight" in own:
        own["pos_embed"] = _without_class_row(own)
    encoder_depth = None
    if any(isinstance(name, str) and name.startswith("decoder_blocks.") for name in own):
        encoder_depth = depth = _count(own, r"blocks\.(\d+)\.")
        own = {
            re.sub(r"^decoder_blocks\.(\d+)\.", lambda match: f"blocks.{int(match.group(1)) + depth}.", name): value
            for name, value in own.items()
        }
    return own, encoder_depth


def own_name(name):
    """Our name of a parameter that REG, or an earlier version of ours, calls otherwise; others stay as they are."""
    for own, other in (*REG_NAMES.items(), ("mixer.layers.0.", "mixer.block.")):
        if name.startswith(other):
            return own + name.removeprefix(other)
    return name


def _without_class_row(state_dict):
    """The position embedding of the patches alone, (1, N, D): REG's has a row of zeros for the class token in front."""
    position = _tensor(state_dict, "pos_embed", 3)
    if math.isqrt(position.shape[1]) ** 2 == position.shape[1]:
        return position
    if not position.is_meta and position[:, 0].any():
        raise UsageError(
            "the weights' pos_embed has a first row that is not zero, but REG's class token has no position: this is "
            "another model"
        )
    return position[:, 1:]


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


def _tensor(state_dict, name, rank):
    value = state_dict.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != rank:
        raise UsageError(f"the weights have no {name} of {rank} dimensions: not a SiT, REPA or REG checkpoint")
    return value


def _count(state_dict, pattern):
    """One more than the largest number that `pattern` finds at the start of a name."""
    found = [re.match(pattern, name) for name in state_dict if isinstance(name, str)]
    return max((int(match.group(1)) + 1 for match in found if match), default=0)
