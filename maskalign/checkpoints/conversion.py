"""Convert weights from and to the layouts of REPA and REG, and from official SiT checkpoints.

Our parameter names are those of REPA. REG (arXiv 2507.01467) has other names for the modules that embed and predict the
class token, and its position embedding begins with a row of zeros for the class token. The model's sizes are derived
from the shapes of the weights. Time is reversed for checkpoints with the opposite direction of time.
"""

import functools
import logging
import math
import re
from collections import OrderedDict
from typing import Any, Dict, Mapping, Optional

import torch

from maskalign.checkpoints.origins import read_origin
from maskalign.config.presets import SIZES
from maskalign.errors import UsageError, one_line
from maskalign.models.layers import sincos_position_embedding
from maskalign.models.sit import SiT

log = logging.getLogger(__name__)

# Modules that neither REPA's nor REG's SiT has.
OWN_MODULES = ("mixer.", "fuse.")
# Our prefixes of the modules of a class token, and REG's.
REG_NAMES = {
    "class_embedder.proj.": "cls_projectors2.",
    "class_embedder.norm.": "wg_norm.",
    "final_layer.class_linear.": "final_layer.linear_cls.",
}
CLASS_PARTS = ("class_embedder.", "final_layer.class_linear.")
# Prefixes that compilation, DDP, FSDP and recomputation add to parameter names.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
METADATA_KEY = "maskalign"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Settings that cannot be derived from the shapes.
NOTED = ("heads", "align_depth", "route", "restore", "attention", "position_grid")


class HeadsUnknown(UsageError):
    """The number of attention heads is not known: the file does not contain it, and the sizes are no preset's."""


def from_repa(
    state_dict: Mapping[str, Any],
    *,
    heads: Optional[int] = None,
    align_depth: Optional[int] = None,
    mixer: Optional[str] = None,
    mixer_layers: Optional[int] = None,
    class_dim: Optional[int] = None,
    weights: str = "ema",
    layout: str = "auto",
    **settings: Any,
) -> SiT:
    """Build a model with the weights of a REPA, REG or SiT checkpoint, or of an export of maskalign.

    The sizes are derived from the shapes of the weights. Other settings are taken from, in this order: the arguments,
    the settings that `to_repa` or `to_reg` saved, the checkpoint's `args` (model, encoder_depth), the preset of these
    sizes. `args` also contains the path and the direction of time of a SiT. It is also used to reject checkpoints of
    other models: DiT, and models that predict noise or a score.

    Args:
        state_dict: a state dict, or the whole dict of a checkpoint (`model`, `ema`, `args`...). Prefixes from
            torch.compile, DDP and FSDP are removed from the names.
        heads: number of attention heads; required if it is not known from the checkpoint or a preset. `num_heads` is
            another name of this argument.
        align_depth: the block that is aligned, counted from 1; by default the one after a third of the blocks.
        mixer: kind of a mixer to add if the weights have none; a new mixer is the identity.
        mixer_layers: number of layers of the mixer `attention`; by default as many as the weights have, or 2 for a new
            mixer. Additional layers are new.
        class_dim: width of a class token to add if the weights have none. Its parts have initial values. Unlike a new
            mixer it changes the predictions of the model, because there is one more token in the attention.
        weights: `ema` or `model`, the set of weights of a whole checkpoint to use.
        layout: `repa` (also for REG); `sit` for official SiT checkpoints, in which t = 1 is data; `auto` to decide by
            `args`. Without `args`, a checkpoint that predicts twice its input channels (learn_sigma) counts as SiT's.
        settings: other arguments of `SiT`, e.g. route, restore, attention, and teacher_dims for weights without
            projectors. With another input_size the position embedding is resampled to its grid.

    Returns:
        SiT in the widest dtype of the weights, in training mode. A warning is logged if the checkpoint does not say how
        the weights were trained.

    Raises:
        HeadsUnknown: `heads` is required.
        UsageError: these are not weights of a SiT that predicts velocities, or the settings do not fit them.
    """
    if layout not in ("auto", "repa", "sit"):
        raise ValueError(f"layout must be auto, repa or sit, got {layout!r}")
    model, doubt = read_model(
        state_dict, heads=settings.pop("num_heads", heads), align_depth=align_depth, mixer=mixer,
        mixer_layers=mixer_layers, class_dim=class_dim, weights=weights, layout=layout, **settings,
    )  # fmt: skip
    if doubt:
        log.warning("%s", doubt)
    return model


def read_model(
    checkpoint, *, heads=None, align_depth=None, mixer=None, mixer_layers=None, class_dim=None, weights="ema",
    layout="auto", **settings,
):  # fmt: skip
    """As `from_repa`, but returns (model, warning or None) and does not log the warning."""
    origin = read_origin(checkpoint)
    state_dict = pick_weights(checkpoint, weights)
    noted = (getattr(state_dict, "_metadata", None) or {}).get(METADATA_KEY)
    noted = noted if isinstance(noted, dict) else {}
    state_dict, encoder_depth = _own_names(state_dict)
    _check_tensors(state_dict)
    sizes = read_sizes(state_dict)
    _check_origin(origin, sizes, heads)
    predicted = state_dict["final_layer.linear.weight"].shape[0] // sizes["patch_size"] ** 2
    variance = predicted == 2 * sizes["in_channels"]
    layout = origin.layout or ("sit" if variance else "repa") if layout == "auto" else layout
    if layout == "sit":
        state_dict = _turn_time(state_dict, sizes)

    told = {"heads": sizes["heads"] or origin.heads, "align_depth": encoder_depth or origin.align_depth}
    told |= {name: noted[name] for name in NOTED if name in noted}  # not checked yet: other programs may write anything
    told |= {name: value for name, value in (("heads", heads), ("align_depth", align_depth)) if value is not None}
    sizes.update({name: value for name, value in told.items() if value is not None})
    if sizes["heads"] is None:
        _guess_heads(sizes)
    for name in ("heads", "align_depth", "position_grid"):
        if name == "position_grid" and sizes.get(name) is None:
            continue
        if not isinstance(sizes[name], int) or isinstance(sizes[name], bool) or sizes[name] < 1:
            raise UsageError(f"{name} is {sizes[name]!r}, which is not a whole number of at least 1")
    input_size = settings.pop("input_size", None)
    if input_size is not None and input_size != sizes["input_size"]:
        state_dict = _resize(state_dict, sizes, input_size)
    fresh = _fresh_mixer(sizes, mixer, mixer_layers) + _fresh_class_token(sizes, class_dim)
    if settings.get("restore") == "fuse" and "fuse.linear.weight" not in state_dict:
        fresh.append("fuse.")
    if not sizes["teacher_dims"]:
        fresh.append("projectors.")  # if `settings` has teacher_dims
    try:
        model = SiT(**{**sizes, **settings})
    except (ValueError, TypeError, ZeroDivisionError, RuntimeError, OverflowError) as error:
        raise UsageError(f"the weights do not make a SiT: {one_line(error)}") from None
    _load(model, state_dict, fresh)
    return model, None if noted else origin.doubt(variance)


def _resize(state_dict, sizes, input_size):
    """Set another input size in `sizes`, and return the weights with the position embedding of that size."""
    patch, old = sizes["patch_size"], sizes["input_size"] // sizes["patch_size"]
    if not isinstance(input_size, int) or input_size < 1 or input_size % patch:
        raise UsageError(f"input_size {input_size} is not a multiple of the patch size {patch}")
    if sizes["mixer"] == "token_mlp":
        raise UsageError(
            f"the mixer token_mlp has weights for {old**2} tokens, which fit no other input size; start a run from "
            "them with training.init_from, where the mixer starts fresh"
        )
    counted = sizes.get("position_grid") or old
    if not has_fixed_positions(state_dict["pos_embed"], (old, old), sizes.get("position_grid")):
        raise UsageError(
            "the weights' position embedding is not the fixed sine-cosine one, and cannot be resampled to another size"
        )
    grid = (input_size // patch,) * 2
    sizes.update(input_size=input_size, position_grid=counted if counted != grid[0] else None)
    position = sincos_position_embedding(sizes["width"], grid, sizes["position_grid"])
    return {**state_dict, "pos_embed": position.to(state_dict["pos_embed"])}


def has_fixed_positions(position, grid, counted=None):
    """True if a position embedding (1, N, D) is the fixed one of a grid, up to the rounding of its dtype."""
    if position.shape[-1] % 4 or position.shape[1] != grid[0] * grid[1]:
        return False
    own = sincos_position_embedding(position.shape[-1], grid, counted)
    return bool(
        (position.float() - own.to(position.device)).abs().max() < (1e-4 if position.dtype.itemsize > 2 else 1e-2)
    )


def _check_origin(origin, sizes, heads):
    """Raise a UsageError if the weights do not fit the checkpoint's `args`."""
    differ = [f"{name} {value}" for name, value in origin.sizes.items() if sizes[name] != value]
    if differ and heads is None:
        raise UsageError(
            f"the checkpoint's args name a preset with {', '.join(differ)}, but the weights have "
            + ", ".join(f"{name} {sizes[name]}" for name in origin.sizes)
            + "; if they are right, give their number of heads (--heads N, from_repa(..., heads=N))"
        )
    if origin.num_classes is not None and origin.num_classes != sizes["num_classes"]:
        raise UsageError(
            f"the checkpoint's args say {origin.num_classes} classes, but the label table has "
            f"{sizes['num_classes'] + 1} rows, one for each class and one for no class"
        )


def _guess_heads(sizes):
    """Set the number of heads to that of the preset of these sizes."""
    preset = [size for size in SIZES.values() if (size["depth"], size["width"]) == (sizes["depth"], sizes["width"])]
    if not preset:
        raise HeadsUnknown(
            f"the weights have {sizes['depth']} blocks of width {sizes['width']}, which no preset has, and nothing "
            "says their number of attention heads; give it: maskalign convert IN OUT --heads N, or heads=N in Python"
        )
    sizes["heads"] = preset[0]["heads"]


def from_reg(state_dict: Mapping[str, Any], **settings: Any) -> SiT:
    """As `from_repa`, for a REG checkpoint; weights without a class token are an error.

    Args:
        state_dict: a state dict, or the whole dict of a checkpoint.
        settings: as for `from_repa`. With `class_dim` the weights may also be REPA's or SiT's.

    Raises:
        HeadsUnknown: `heads` is required.
        UsageError: the weights have no class token, or see `from_repa`.
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
        strict: return only tensors that REPA's own SiT can load. Otherwise the mixer, the fusion and the class token's
            parts are included under their own names, and `from_repa(to_repa(m))` is equal to m for every model.

    Returns:
        OrderedDict of detached tensors that share memory with the model. Settings that cannot be derived from the
        shapes (heads, alignment depth, route) are in its `_metadata`, which torch.save keeps and load_state_dict
        ignores.

    Raises:
        UsageError: with strict, the model has a mixer that is not the identity, a class token, a fusion, or other
            projectors than REPA's.
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
        strict: return only tensors that REG's own SiT can load. Otherwise the mixer and the fusion are included under
            their own names, and `from_reg(to_reg(m))` is equal to m for every model with a class token.

    Returns:
        OrderedDict as from `to_repa`; `pos_embed` is (1, 1 + N, D) with a first row of zeros.

    Raises:
        UsageError: the model has no class token; or with strict, it has a mixer that is not the identity, a fusion,
            other projectors than REG's, or a class token of another width than the first teacher's rows.
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
    # REG's own order, because the state of its optimizer refers to parameters by their number.
    last = ("projectors.", "final_layer.", "cls_projectors2.", "wg_norm.", *OWN_MODULES)

    def place(name):
        return next((number for number, prefix in enumerate(last, 1) if name.startswith(prefix)), 0)

    return _noted(model, {name: renamed[name] for name in sorted(renamed, key=place)})


def _strict(model, source, layout):
    """The part of a state dict that the code of REPA or REG can load."""
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
    """Detached weights, with the settings of `NOTED` as `_metadata`."""
    out = OrderedDict((name, value.detach()) for name, value in source.items())
    route = list(model.route) if model.route else "none"
    attention = model.blocks[0].attn.implementation
    values = (model.heads, model.align_depth, route, model.restore, attention, model.position_grid)
    noted = dict(zip(NOTED, values, strict=True))
    setattr(out, "_metadata", {METADATA_KEY: noted})  # noqa: B010  torch's own attribute, unknown to type checkers
    return out


def is_identity(mixer):
    """True if a mixer returns its input: its adaLN linear is zero, as at initialization."""
    return all(not parameter.any() for name, parameter in mixer.named_parameters() if "adaLN_modulation" in name)


def pick_weights(checkpoint, weights="ema"):
    """The state dict in a whole checkpoint (`weights` is `ema` or `model`); a state dict is returned unchanged.

    Raises:
        UsageError: there is no state dict.
    """
    if not isinstance(checkpoint, dict) or not checkpoint:
        raise UsageError(f"no weights: expected a dict of tensors, got {type(checkpoint).__name__}")
    nested = [name for name in ("ema", "model", "state_dict") if isinstance(checkpoint.get(name), dict)]
    other = [name for name in ("ema", "model") if checkpoint.get(name) is not None and name not in nested]
    if other:
        kind = type(checkpoint[other[0]]).__name__
        raise UsageError(f"the checkpoint's {other[0]!r} is a {kind}, not a dict of weights")
    if not nested:
        return checkpoint
    chosen = weights if weights in nested else nested[0] if len(nested) == 1 else None
    if chosen is None:
        raise UsageError(f"the checkpoint has no {weights!r} weights; it has {', '.join(nested)}")
    return checkpoint[chosen]


def read_sizes(state_dict):
    """The arguments of `SiT` derived from the names and shapes in a state dict; `heads` is None if not known.

    Raises:
        UsageError: these are not weights of a SiT.
    """
    patch = _tensor(state_dict, "x_embedder.proj.weight", 4)
    positions = _tensor(state_dict, "pos_embed", 3)
    width, channels, patch_size, _ = patch.shape
    side = math.isqrt(positions.shape[1])
    if side**2 != positions.shape[1] or patch.shape[2] != patch.shape[3]:
        raise UsageError(f"the weights are for {positions.shape[1]} tokens, which is not a square grid")
    if not (width and channels and patch_size and positions.shape[1]):
        raise UsageError("the weights' patch or position embedding is empty: not a SiT, REPA or REG checkpoint")
    depth = _count(state_dict, "blocks.")
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
        heads=_heads_of_norm(state_dict, width),
        # The model truncates width * mlp_ratio to a whole number, so the ratio must not be too small by rounding.
        mlp_ratio=hidden / width if int(width * (hidden / width)) == hidden else (hidden + 0.5) / width,
        qk_norm="blocks.0.attn.q_norm.weight" in state_dict,
        align_depth=min(depth, preset["align_depth"] if preset else max(1, round(depth / 3))),
        restore="fuse" if "fuse.linear.weight" in state_dict else "none",
    )
    _tensor(state_dict, "final_layer.linear.weight", 2)
    return {**sizes, **_projector_sizes(state_dict), **_mixer_sizes(state_dict), **_class_sizes(state_dict)}


def _heads_of_norm(state_dict, width):
    """Number of heads, from the width of a head in qk_norm's weights; None without these."""
    norm = state_dict.get("blocks.0.attn.q_norm.weight")
    return width // norm.shape[0] if norm is not None and norm.dim() == 1 and norm.shape[0] else None


def _projector_sizes(state_dict):
    teachers = range(_count(state_dict, "projectors."))
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
    layers = _count(state_dict, "mixer.layers.")
    return {"mixer": "attention", "mixer_layers": layers} if layers else {"mixer": "none"}


def _class_sizes(state_dict):
    if "class_embedder.proj.weight" not in state_dict:
        return {"class_dim": None}
    return {"class_dim": _tensor(state_dict, "class_embedder.proj.weight", 2).shape[1]}


def _fresh_mixer(sizes, mixer, layers):
    """Set a requested mixer in `sizes`; returns the prefixes of parameters that the weights may lack."""
    present = sizes["mixer"]
    if mixer is not None and present not in ("none", mixer):
        raise UsageError(f"the weights have a mixer {present!r}; it cannot be replaced by {mixer!r}")
    sizes["mixer"] = mixer or present
    if layers is None:
        return ["mixer."] if sizes["mixer"] != present else []
    if sizes["mixer"] != "attention":
        raise UsageError(f"mixer_layers needs the mixer attention, but the mixer is {sizes['mixer']!r}")
    known = sizes.get("mixer_layers", 0)
    if layers < known:
        raise UsageError(f"the weights have {known} mixing layers, which cannot become {layers}")
    sizes["mixer_layers"] = layers
    return [f"mixer.layers.{number}." for number in range(known, layers)]


def _fresh_class_token(sizes, class_dim):
    """Set a requested class token in `sizes`; returns the prefixes of parameters that the weights may lack."""
    present = sizes["class_dim"]
    if class_dim is None or class_dim == present:
        return []
    if present is not None:
        raise UsageError(f"the weights have a class token of {present} numbers, which cannot become {class_dim}")
    sizes["class_dim"] = class_dim
    return list(CLASS_PARTS)


def _own_names(state_dict):
    """(state dict under our names, alignment depth or None).

    In REPA's first checkpoints the blocks after the tap are called `decoder_blocks`, which gives the alignment depth.
    An earlier version of maskalign had a single mixing layer, called `mixer.block`.
    """
    own = {}
    for name, value in state_dict.items():
        if not isinstance(name, str):
            raise UsageError(
                f"the weights have an entry {name!r}, which is not a name: not a SiT, REPA or REG checkpoint"
            )
        new = own_name(WRAPPERS.sub("", name))
        if new in own:
            raise UsageError(f"the weights have {new} twice, under different prefixes: the file is two models in one")
        own[new] = value
    if "class_embedder.proj.weight" in own:
        own["pos_embed"] = _without_class_row(own)
    encoder_depth = None
    if any(name.startswith("decoder_blocks.") for name in own):
        encoder_depth = depth = _count(own, "blocks.")
        own = {
            re.sub(r"^decoder_blocks\.(\d{1,4})\.", lambda match: f"blocks.{int(match.group(1)) + depth}.", name): value
            for name, value in own.items()
        }
    return own, encoder_depth


def own_name(name):
    """Our name of a parameter of REG or of an earlier version of maskalign; other names are unchanged."""
    for own, other in (*REG_NAMES.items(), ("mixer.layers.0.", "mixer.block.")):
        if name.startswith(other):
            return own + name.removeprefix(other)
    return name


def _without_class_row(state_dict):
    """The position embedding of the patches, (1, N, D), without the row of zeros for the class token in REG's."""
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
    """Convert official SiT's weights (t = 1 is data, 2C output channels) to ours: v(x, t) = -v_SiT(x, 1 - t), exactly.

    cos(w(1 - t)) and sin(w(1 - t)) are rotations of cos(wt) and sin(wt). The change of time is therefore a change of
    the weights of the first linear of the time embedding, and the sign is changed in the final linear.
    """
    out = dict(state_dict)
    p, channels = sizes["patch_size"], sizes["in_channels"]
    _check_official(state_dict, p * p * channels)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        rows = state_dict[name].unflatten(0, (p, p, -1))
        # The channels after the first C are the variance from learn_sigma, which sampling does not use.
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


def _check_official(state_dict, numbers):
    """Raise a UsageError for shapes that `_turn_time` cannot convert.

    Args:
        numbers: the number of predicted values per patch; the weights must have this number or twice this number.
    """
    weight, bias = (
        _tensor(state_dict, "final_layer.linear.weight", 2),
        _tensor(state_dict, "final_layer.linear.bias", 1),
    )
    if weight.shape[0] not in (numbers, 2 * numbers) or bias.shape[0] != weight.shape[0]:
        raise UsageError(
            f"the weights' final_layer.linear predicts {weight.shape[0]} numbers for a patch (bias {bias.shape[0]}); a "
            f"SiT of these sizes predicts {numbers} or {2 * numbers}"
        )
    time = _tensor(state_dict, "t_embedder.mlp.0.weight", 2)
    if time.shape[1] % 2 or not time.shape[1]:
        raise UsageError(f"the weights' t_embedder.mlp.0.weight is {tuple(time.shape)}; cosines and sines go in pairs")


def _check_tensors(state_dict):
    """Raise a UsageError unless all values are dense floating-point tensors of finite numbers."""
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            raise UsageError(f"the weights' {name} is a {type(value).__name__}, not a tensor")
        if value.dtype not in DTYPES or value.layout != torch.strided:
            kind = value.dtype if value.layout == torch.strided else value.layout
            raise UsageError(f"the weights' {name} is {kind}; weights are {', '.join(map(str, DTYPES))}")
        if not value.numel():
            raise UsageError(f"the weights' {name} is empty: {tuple(value.shape)}")
        if not value.is_meta and not value.isfinite().all():
            raise UsageError(
                f"the weights' {name} has numbers that are not finite: the training diverged, or the file is damaged"
            )


def _load(model, state_dict, fresh):
    expected = model.state_dict()
    missing = [name for name in expected if name not in state_dict and not name.startswith(tuple(fresh))]
    unknown = [name for name in state_dict if name not in expected]
    if missing or unknown:
        what = f"lack {missing[0]}" if missing else f"have {unknown[0]}, which a SiT of these sizes does not have"
        more = len(missing) + len(unknown) - 1
        raise UsageError(f"the weights {what}" + (f" (and {more} more names differ)" if more else ""))
    for name, value in state_dict.items():
        if value.shape != expected[name].shape:
            raise UsageError(
                f"the weights' {name} is {tuple(value.shape)}; a SiT of these sizes has {tuple(expected[name].shape)}"
            )
    model.to(functools.reduce(torch.promote_types, (value.dtype for value in state_dict.values())))
    model.load_state_dict(state_dict, strict=False)


def _tensor(state_dict, name, rank):
    value = state_dict.get(name)
    if not isinstance(value, torch.Tensor) or value.dim() != rank:
        raise UsageError(f"the weights have no {name} of {rank} dimensions: not a SiT, REPA or REG checkpoint")
    return value


def _count(state_dict, prefix):
    """Number of modules whose names are `prefix` and a number; the numbers must be 0, 1, 2... without a gap."""
    pattern = re.compile(rf"{re.escape(prefix)}(0|[1-9]\d{{0,3}})\.")
    found = {int(match.group(1)) for name in state_dict if isinstance(name, str) and (match := pattern.match(name))}
    if found != set(range(len(found))):
        hole = next(number for number in range(len(found)) if number not in found)
        raise UsageError(f"the weights have {prefix}{max(found)}, but no {prefix}{hole}: parts of the file are missing")
    return len(found)
