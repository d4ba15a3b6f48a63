"""Checks of a run against its processes, its data set and its run folder; imports no torch."""

import os
from pathlib import Path

from maskalign.checkpoints.sources import check_source
from maskalign.config import validate_with_data, validate_with_ranks
from maskalign.data.build.building import WORK
from maskalign.data.format.manifest import FILE_NAME, Manifest, other_classes
from maskalign.data.stream.mixture import check_class_tokens, open_data_sets
from maskalign.errors import UsageError
from maskalign.models.flash import check_flash
from maskalign.teachers.hub import check_weights
from maskalign.training.wandb_log import check_wandb


def check_data(config):
    """Read the manifest of the (first) data set, and check the settings against it.

    Returns:
        (manifest, facts), see `config.validate_with_data`.

    Raises:
        UsageError: the data set does not exist or does not fit the settings, or the run folder is in use.
    """
    world_size, local = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_WORLD_SIZE")
    validate_with_ranks(config, world_size, local and int(local))
    if config.model.attention == "flash_attn":
        check_flash(config.training.device, config.training.precision)
    _, openers, manifests = open_data_sets(
        config.data.path, cache_dir=config.data.cache_dir, allow_pipe=config.data.allow_pipe
    )
    manifest = manifests[0]
    facts = validate_with_data(config, manifest, sum(other.num_samples for other in manifests))
    sources = dict(facts.teachers + ([facts.class_token] if facts.class_token else []))
    if facts.class_token:
        roots = [opener.root for opener in openers]
        check_class_tokens(roots, manifests, [name for name, cached in sources.items() if cached])
    run_dir, resume = Path(config.run_dir), config.training.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise UsageError(f"run_dir: {run_dir} is a file; choose a folder")
    if resume == "never" and any(run_dir.glob("checkpoints/step_*")):
        raise UsageError(
            f"training.resume: never, but {run_dir} holds checkpoints; choose another run_dir, or resume auto"
        )
    if any((run_dir / name).exists() for name in (FILE_NAME, WORK)):
        raise UsageError(f"run_dir: {run_dir} is the folder of a data set; choose another one for the run")
    if resume not in ("auto", "never", "restart"):
        _check_resume(Path(resume))
    for name, cached in sources.items():
        if not cached:
            check_weights(name, config.teacher.weights)
    if "wandb" in config.training.loggers:
        check_wandb()
    if config.evaluate.every:
        _check_evaluation(config.evaluate, manifest)
    init_from = config.training.init_from
    if init_from is not None:
        check_source(init_from, "training.init_from")
    return manifest, facts


def _check_resume(path):
    """Check that the path is a checkpoint or a run with one; damage is found later, when it is read."""
    if not path.is_dir():
        raise UsageError(f"training.resume: '{path}' is neither auto, never, restart nor the folder of a checkpoint")
    if not (path / "state.json").is_file() and not any(path.glob("checkpoints/step_*")):
        raise UsageError(f"training.resume: {path} holds no checkpoint; give a run folder, or a step_* folder of one")


def _check_evaluation(settings, manifest):
    """Check that the teacher of the distances is available, and that the held-out data fit the training data."""
    if settings.samples:
        check_weights(settings.teacher, None)
    if settings.data is None:
        return
    held_out = Manifest.load(settings.data)
    for what, one, other in (
        ("resolution", held_out.resolution, manifest.resolution),
        ("number of classes", held_out.num_classes, manifest.num_classes),
        ("latents", (held_out.latent or {}).get("shape"), (manifest.latent or {}).get("shape")),
    ):
        if one != other:
            raise UsageError(f"evaluate.data: {settings.data} has the {what} {one}, the training data {other}")
    difference = other_classes(held_out.class_names, manifest.class_names)
    if difference:
        raise UsageError(f"evaluate.data: {settings.data} has other classes than the training data: {difference}")
