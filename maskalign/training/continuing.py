"""The settings that may change when a run resumes, and those that must not.

A checkpoint has the settings and the `ModelSpec` with which it was trained. The model and the objective must not
change: other values are rejected, even if all shapes match. The learning rate, the number of steps, logging, the plan
and similar settings may change, and are reported with their old and new values.
"""

import hashlib
import json

from maskalign.config import all_keys, as_schedule, model_sizes
from maskalign.data.build.recipe import weights_label
from maskalign.data.format.manifest import other_classes
from maskalign.errors import UsageError

# Settings of speed, paths, logging and intervals, and of schedules and the optimizer from the resumed step on.
MAY_CHANGE = ("data.", "optimizer.", "training.", "preview.", "evaluate.", "parallel.", "teacher.mode")
MAY_CHANGE_TOO = (
    "model.attention",
    "model.fused_adaln",
    "method.keep_ratio",
    "method.align_weight",
    "method.align_ratio",
)
MAY_CHANGE_TOO += ("method.class_weight", "method.subset", "method.keep_multiple", "teacher.weights")
# Settings that may differ in every start, and are not reported.
SILENT = ("run_dir", "training.resume", "training.init_from", "training.progress", "model.preset")
MOST = 4  # the largest number of differences in one line


def effective(config):
    """{dotted name: value} of all settings with an effect, in a canonical form: a preset is replaced by its sizes."""
    flat = {}
    for key in all_keys():
        value = config
        for part in key.split("."):
            value = getattr(value, part)
        flat[key] = tuple(value) if isinstance(value, list) else value
    sizes = model_sizes(config)
    for name, value in sizes.items():
        flat[f"method.{name}" if name == "align_depth" else f"model.{name}"] = value
    route = flat["method.route"]
    flat["method.route"] = {"all": (0, sizes["depth"]), "none": "none"}.get(route, route)
    for key in ("method.keep_ratio", "method.align_weight", "method.align_ratio"):
        schedule = None if flat[key] is None else as_schedule(flat[key])
        flat[key] = schedule.start if schedule is not None and schedule.kind == "constant" else schedule
    model = config.model
    needed = {
        "model.mixer_hidden": model.mixer == "token_mlp",
        "model.mixer_layers": model.mixer == "attention",
        "model.projector_dim": model.projector == "mlp",
    }
    return {key: value for key, value in flat.items() if needed.get(key, True)}


def changed_settings(path, there, here):
    """Compare the settings with those of a checkpoint.

    Args:
        path: path of the checkpoint.
        there, here: `Config` of the checkpoint and of this start.

    Returns:
        list of str, one for each changed setting that may change.

    Raises:
        UsageError: a setting has changed that must not.
    """
    old, new = effective(there), effective(here)
    changed = [key for key in new if key in old and old[key] != new[key] and key not in SILENT]
    # Teachers are compared in `check_spec`, where it is known which of them are used, and the seed in `check_stream`.
    changed = [key for key in changed if key not in ("teacher.names", "teacher.normalize", "seed")]
    refused = [key for key in changed if not key.startswith(MAY_CHANGE) and key not in MAY_CHANGE_TOO]
    if refused:
        differences = [f"{key} {_text(old[key])} (now {_text(new[key])})" for key in refused]
        other = any(key.startswith("model.") or key == "objective.path" for key in refused)
        raise UsageError(
            f"{path} was trained with {_list(differences)}; a run cannot change its model and objective: set "
            f"{'it' if len(refused) == 1 else 'them'} back, or "
            + ("train another run with --run_dir NEW" if other else new_run(path))
        )
    return [f"{key} {_text(old[key])} -> {_text(new[key])}" for key in changed]


def new_run(path):
    """The advice for a checkpoint that cannot be resumed, as part of a message."""
    return f"start a new run from its weights with --training.init_from {path} --run_dir NEW"


def data_record(config, manifests, facts):
    """The description of the data in a checkpoint, which `check_spec` compares in a later start.

    Args:
        config: `Config`.
        manifests: the `Manifest`s of all data sets.
        facts: `config.DataFacts`.

    Returns:
        dict that can be written as JSON.
    """
    manifest, features = manifests[0], {}
    for name, _ in facts.sources:
        entry = manifest.teachers.get(name)
        if entry is None:
            features[name] = {
                "normalize": config.teacher.normalize,
                "weights": weights_label(config.teacher.weights),
            }
        else:
            features[name] = {"normalize": entry["normalize"], "weights": entry.get("weights", "default")}
            features[name]["mean"] = _digest(entry.get("mean"))
    class_token = None
    if facts.class_token:
        name = facts.class_token[0]
        entry = manifest.teachers.get(name, {}).get("class_token", {})
        count, components = config.model.class_token_dim, entry.get("components") or {}
        used = {key: entry.get(key) for key in ("mean", "std")}
        if count is not None:
            used |= {"components": [components["mean"], components["basis"][:count], components["scale"][:count]]}
        class_token = {"teacher": name, "statistics": _digest(used)}
    builds = [(other.extra.get("build") or {}).get("fingerprint") for other in manifests]
    samples = sum(other.num_samples for other in manifests)
    return {"samples": samples, "builds": builds, "features": features, "class_token": class_token}


def check_spec(path, there, here):
    """Check that a checkpoint has the same data and teacher.

    Args:
        path: path of the checkpoint.
        there, here: `ModelSpec` of the checkpoint and of this start. Entries that a checkpoint of an earlier version
            does
            not have are not compared.

    Raises:
        UsageError: the data or the teacher differ.
    """

    def require(same, what):
        if not same:
            raise UsageError(f"{path}: {what}; use the data and the teacher of the run, or {new_run(path)}")

    names = {
        "input_size": "images or latents of side",
        "in_channels": "images or latents with channels",
        "num_classes": "as number of classes",
    }
    for key, name in names.items():
        old, new = getattr(there, key), getattr(here, key)
        require(old == new, f"was trained with {name} {old}, the data now have {new}")
    difference = other_classes(there.class_names, here.class_names)
    require(not difference, f"the data now have other classes than those it was trained with: {difference}")
    old, new = there.teachers, here.teachers
    require(old is None or old == new, f"was aligned with {_names(old)}, now it would be with {_names(new)}")
    for key, name in (("teacher_dims", "teacher features of width"), ("class_dim", "a class token of width")):
        old, new = getattr(there, key), getattr(here, key)
        require(old == new, f"was trained with {name} {old}, now it is {new}")
    old, new = there.latent, here.latent
    if old is not None and new is not None:
        for key in ("scale", "bias", "shape"):
            require(
                old.get(key) == new.get(key),
                f"was trained on latents with {key} {old.get(key)}, those of the data have {new.get(key)}",
            )
    old, new = there.data or {}, here.data
    for name, entry in (old.get("features") or {}).items():
        for key, value in entry.items():
            now = new["features"].get(name, {}).get(key, value)
            what = {"mean": "another mean token"}.get(key, f"{key} {value} (now {now})")
            require(value == now, f"the features of {name} were made with {what}")
    old, new = old.get("class_token"), new["class_token"]
    if old is not None and new is not None:
        require(old == new, "the class tokens are of another teacher, or standardized or projected with other numbers")


def check_stream(path, state, stream, config, there):
    """Check that the position of a checkpoint refers to the same images in the data.

    Args:
        path: path of the checkpoint.
        state: state of the stream in the checkpoint.
        stream: the `ShardStream`.
        config: `Config`.
        there: the checkpoint's `ModelSpec`.

    Returns:
        list of str about allowed changes.

    Raises:
        UsageError: other data, another seed, or a batch size that is not a multiple of the number of logical streams.
    """
    if state["seed"] != config.seed:
        raise UsageError(
            f"seed: {config.seed}, but {path} was trained with {state['seed']}, from which the order of its images and "
            f"all draws follow; set seed {state['seed']}, or {new_run(path)}"
        )
    data = there.data or {}
    if list(state["data"]) != [manifest.digest() for manifest in stream.manifests]:
        before = f" {data['samples']:,} images" if "samples" in data else " other shards"
        shards = sum(len(manifest.shards) for manifest in stream.manifests)
        raise UsageError(
            f"data.path: {_text(config.data.path)} holds {stream.num_samples:,} images in {shards:,} shards, but "
            f"{path} was trained on{before}: images were added, removed or rebuilt, so the run's position in the data "
            f"is not valid; restore the data set, or {new_run(path)}"
        )
    if config.training.batch_size % state["streams"]:
        raise UsageError(
            f"training.batch_size: {config.training.batch_size}, but {path} reads its images in {state['streams']} "
            f"logical streams and can resume only with multiples of {state['streams']}; choose one, or {new_run(path)}"
        )
    builds = [(manifest.extra.get("build") or {}).get("fingerprint") for manifest in stream.manifests]
    if "builds" in data and data["builds"] != builds:
        return ["the images were rebuilt from other files or with other settings (the same number of images)"]
    return []


def _digest(value):
    return None if value is None else hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _names(teachers):
    return ", ".join(teachers or []) or "no teacher"


def _text(value):
    if isinstance(value, dict):
        return ", ".join(map(str, value))
    if hasattr(value, "kind"):
        return f"{value.kind} {value.start:g} to {value.end:g}"
    return str(list(value) if isinstance(value, tuple) else value).replace("'", "")


def _list(texts):
    more = len(texts) - MOST
    return ", ".join(texts[:MOST]) + (f" and {more} more" if more > 0 else "")
