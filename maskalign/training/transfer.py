"""`training.init_from`: start a new run from the weights of another model.

Tensors that both models have are loaded. Parts that depend on the data or the teacher (label table, projectors, class
token) start from their initial values if they do not fit, and so do parts that the other model lacks. Another
architecture or another path of the objective is rejected: its weights might load because shapes happen to agree, but
the model would compute something else.
"""

import torch

from maskalign.checkpoints.conversion import HeadsUnknown, has_fixed_positions, to_repa
from maskalign.checkpoints.loading import load
from maskalign.errors import UsageError
from maskalign.models.initial import assign

# Parts that a plain SiT lacks; they start from their initial values.
OWN_PARTS = ("mixer.", "fuse.", "projectors.", "class_embedder.", "final_layer.class_linear.")
LABELS = "y_embedder.embedding_table.weight"
CLASS_PARTS = ("class_embedder.", "final_layer.class_linear.")
# (attribute of `SiT`, setting): sizes that must agree, because otherwise equal shapes would compute something else.
SIZES = (
    ("depth", "model.depth"),
    ("width", "model.width"),
    ("heads", "model.heads"),
    ("patch_size", "model.patch_size"),
    ("in_channels", "channels of the data"),
)


def init_from(model, path, config, spec):
    """Load the averaged weights at a path into a new model.

    Args:
        model: `SiT` with its initial weights, sharded over the ranks or not; its position embedding is changed to the
            one that the weights were trained with.
        path: a run, a checkpoint or a file of weights.
        config: `Config` of the new run.
        spec: `ModelSpec` of the new run.

    Returns:
        A line of text: what was loaded, what starts fresh and why, and which tensors of the file are not used.

    Raises:
        UsageError: the file cannot be read, or holds another architecture or objective.
    """
    loaded, knows_heads = _load(path, model.heads)
    there, info = loaded.model, loaded.info
    weights = to_repa(there)
    own, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    _check_function(path, model, there, own, weights, config, info.path)
    fresh = _fresh(model, there, own, weights, spec, loaded)
    notes = list(fresh.values())
    resampled = _positions(path, model, there)
    dropped = {name for name in weights for prefixes in fresh if name.startswith(prefixes)}
    taken = [name for name in own if name in weights and name not in dropped and name != LABELS]
    for name in taken:
        assign(own[name], weights[name])
    count = len(taken) + 1
    notes += _labels(own[LABELS], weights[LABELS], info.class_names, spec.class_names)
    lacking = [name for name in own if name not in weights]
    if lacking:
        notes.append(_parts(lacking))
    latents = [(latent or {}).get("scale") for latent in (info.latent, spec.latent)]
    unused = [name for name in weights if name not in own and name not in buffers and name not in dropped]
    line = f"training.init_from: {count} of {len(own)} tensors from {path}"
    line += f", step {info.step}" if info.step is not None else ""
    line += resampled
    line += f"; starting fresh: {'; '.join(notes)}" if notes else ""
    if not knows_heads:
        line += f"; the file does not give its number of heads, so model.heads {model.heads} is used"
    if None not in latents and latents[0] != latents[1]:
        line += f"; the latents have the scale {latents[1]}, there {latents[0]}"
    return line + (f"; not used: {_parts(unused)}" if unused else "")


def _positions(path, model, there):
    """Give the model the position embedding of the weights; returns the text about it for `init_from`'s line."""
    if not has_fixed_positions(there.pos_embed, there.grid, there.position_grid):
        raise UsageError(
            f"training.init_from: {path} has a position embedding of its own, which is not the fixed sine-cosine one "
            "of this model; choose other weights"
        )
    counted = there.position_grid or there.grid[0]
    model.count_positions(counted)
    if there.input_size == model.input_size:
        return ""
    return (
        f"; position embedding resampled from {_grid(there)} to {_grid(model)} tokens (input size {model.input_size}, "
        f"there {there.input_size})"
    )


def _load(path, heads):
    """(`Loaded`, whether the file gives its number of heads). A bare file whose sizes are no preset's does not."""
    try:
        return load(path), True
    except HeadsUnknown:
        return load(path, heads=heads), False


def _check_function(path, model, there, own, weights, config, trained_path):
    """Raise a UsageError for weights that compute something else, whether or not their shapes fit."""
    differences = [
        f"{setting} {getattr(there, name)} (here {getattr(model, name)})"
        for name, setting in SIZES
        if getattr(there, name) != getattr(model, name)
    ]
    if not differences:
        for setting, name in (("model.mlp_ratio", "mlp.fc1.weight"), ("model.qk_norm", "attn.q_norm.weight")):
            shapes = [w[f"blocks.0.{name}"].shape if f"blocks.0.{name}" in w else None for w in (weights, own)]
            if shapes[0] != shapes[1]:
                differences.append(f"another {setting}")
    if differences:
        raise UsageError(
            f"training.init_from: {path} is another model: {', '.join(differences)}; set these to its values, or "
            "choose other weights"
        )
    if trained_path != config.objective.path:
        raise UsageError(
            f"training.init_from: {path} was trained with objective.path {trained_path}, so its velocities are not "
            f"those of objective.path {config.objective.path}; set objective.path {trained_path}, or choose other "
            "weights"
        )
    missing = [name for name in own if name not in weights and not name.startswith(OWN_PARTS)]
    foreign = [name for name in weights if name not in own and name != "pos_embed" and not name.startswith(OWN_PARTS)]
    misfit = [
        name
        for name, tensor in weights.items()
        if name in own and tensor.shape != own[name].shape and name != LABELS and not name.startswith(OWN_PARTS)
    ]
    for names, what in ((missing, "lacks"), (foreign, "has"), (misfit, "has another shape of")):
        if names:
            raise UsageError(
                f"training.init_from: {path} {what} {names[0]} ({len(names)} such tensors); it is not a SiT of the "
                "sizes in the settings"
            )


def _fresh(model, there, own, weights, spec, loaded):
    """{prefixes of names: text of what starts fresh and why}, for the parts that both models have but do not fit."""
    fresh = {}

    def misfit(prefix):
        mine = {name: tensor.shape for name, tensor in own.items() if name.startswith(prefix)}
        theirs = {name: tensor.shape for name, tensor in weights.items() if name.startswith(prefix)}
        return mine and theirs and mine != theirs

    teachers = loaded.info.teachers or [None] * len(there.teacher_dims)
    for k in range(min(len(model.teacher_dims), len(there.teacher_dims))):
        name, old = spec.teachers[k], teachers[k]
        prefix = (f"projectors.{k}.",)
        if there.teacher_dims[k] != model.teacher_dims[k]:
            fresh[prefix] = f"projector to {name} ({model.teacher_dims[k]} wide, there {there.teacher_dims[k]})"
        elif old is not None and old != name:
            fresh[prefix] = f"projector to {name} (there to {old})"
        elif misfit(prefix[0]):
            fresh[prefix] = f"projector to {name} (of another kind there)"
        elif loaded.config is not None and there.align_depth != model.align_depth:
            fresh[prefix] = f"projector to {name} (at block {model.align_depth}, there at {there.align_depth})"
    if model.class_dim and there.class_dim:
        kept = loaded.spec.data if loaded.spec is not None else None
        old, new = (kept or {}).get("class_token"), spec.data["class_token"]
        reason = None
        if model.class_dim != there.class_dim:
            reason = f"{model.class_dim} numbers, there {there.class_dim}"
        elif old is not None and new is not None and old != new:
            reason = "of another teacher or with other statistics there"
        elif teachers[:1] and spec.teachers and teachers[0] not in (None, spec.teachers[0]):
            reason = f"of {spec.teachers[0]}, there of {teachers[0]}"
        if reason:
            fresh[CLASS_PARTS] = f"class token ({reason})"
    shared = [name for name in own if name.startswith("mixer.") and name in weights]
    place, place_there = ((each.route or (0, 0))[0] for each in (model, there))
    if any(own[name].shape != weights[name].shape for name in shared):
        fresh[("mixer.",)] = "mixer (of other sizes there)"
    elif shared and place != place_there:
        fresh[("mixer.",)] = f"mixer (before block {place + 1}, there before {place_there + 1})"
    return fresh


@torch.no_grad()
def _labels(parameter, table, old, new):
    """Load the label table; returns a list of text about it. The last row, "no class", is used with any classes."""
    kept = None
    if old is None or old == new:
        kept = "all" if table.shape == parameter.shape else None
    elif sorted(old) == sorted(new):
        table = table[[*(old.index(name) for name in new), len(old)]]
        kept = "sorted"
    if kept:
        assign(parameter, table)
        return ["label table in the data's order of classes"] if kept == "sorted" else []
    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.detach()
    full = full.clone()
    full[-1] = table[-1].to(full)
    assign(parameter, full)
    before, now = table.shape[0] - 1, full.shape[0] - 1
    why = f"{now} classes, there {before}" if before != now else "the classes have other names there"
    return [f'label table ({why}; the row of "no class" is kept)']


def _grid(model):
    return f"{model.grid[0]}x{model.grid[1]}"


def _parts(names):
    """The `OWN_PARTS` that names belong to, as text."""
    return ", ".join(dict.fromkeys(next(p for p in OWN_PARTS if name.startswith(p)).rstrip(".") for name in names))
