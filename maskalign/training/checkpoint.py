"""Checkpoints: torch.distributed.checkpoint in safetensors files, committed by an atomic rename.

    RUN/checkpoints/step_00000100/
        *.safetensors    every tensor by `kind/parameter`: model, ema, exp_avg, exp_avg_sq, step
        state.json       step, seconds, stream position, and the facts that rebuild the model
        config.yaml      the full settings
        COMPLETE         written last: the files' sizes

Tensors go through DCP's safetensors storage, everything else through JSON, so nothing is ever unpickled. A folder
without a matching COMPLETE is never read; a crash while saving leaves the one before as the newest.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from maskalign.config import load_config
from maskalign.errors import RunError, UsageError
from maskalign.training.build import build_model

FOLDER = "checkpoints"
MARKER = "COMPLETE"


def save(run_dir, step, tensors, state, config_yaml, keep=3):
    """Write one checkpoint and remove the oldest beyond `keep`.

    Args:
        run_dir: the run's folder.
        step: number of optimiser steps done.
        tensors: flat dict from name to tensor.
        state: what JSON can hold.
        config_yaml: the run's settings as text.

    Returns:
        Path of the checkpoint.

    Raises:
        RunError: the folder cannot be written to; earlier checkpoints are untouched.
    """
    root = Path(run_dir, FOLDER)
    final = root / f"step_{step:08d}"
    if is_complete(final):
        return final
    partial = root / f".partial_{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with _quiet():
            writer = HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, no_dist=True)
        (partial / "state.json").write_text(json.dumps(state))
        (partial / "config.yaml").write_text(config_yaml)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        for name in sizes:
            _sync(partial / name)
        (partial / MARKER).write_text(json.dumps(sizes))
        _sync(partial / MARKER)
        shutil.rmtree(final, ignore_errors=True)  # an incomplete one of the same step
        os.rename(partial, final)
        _sync(root)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"the checkpoint {final} cannot be written ({error}); free space or choose another run_dir"
        ) from None
    for old in complete_checkpoints(run_dir)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def complete_checkpoints(run_dir):
    """Paths of a run's complete checkpoints, oldest first."""
    return sorted(path for path in Path(run_dir, FOLDER).glob("step_*") if is_complete(path))


def is_complete(path):
    """True where the marker is there and every file that it names has its size."""
    try:
        sizes = json.loads(Path(path, MARKER).read_text())
        return all(Path(path, name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def find(run_or_checkpoint):
    """The checkpoint that a path means: itself, or the newest of a run.

    Raises:
        UsageError: there is no complete checkpoint.
    """
    path = Path(run_or_checkpoint)
    if is_complete(path):
        return path
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such run or checkpoint folder")
    found = complete_checkpoints(path)
    if not found:
        raise UsageError(
            f"{path}: holds no complete checkpoint; give a run folder of maskalign train, or a step_* folder"
        )
    return found[-1]


def read_state(checkpoint):
    """The JSON part of a checkpoint."""
    return json.loads(Path(checkpoint, "state.json").read_text())


def load_tensors(checkpoint, tensors):
    """Fill a flat dict of tensors in place.

    Raises:
        UsageError: a tensor is missing or has another shape: the settings are not those of the checkpoint.
    """
    there = tensor_shapes(checkpoint)
    for name, tensor in tensors.items():
        if name not in there:
            raise UsageError(f"{checkpoint}: has no tensor {name}; it was saved with other model settings")
        if tuple(there[name]) != tuple(tensor.shape):
            raise UsageError(
                f"{checkpoint}: {name} has shape {tuple(there[name])}, the model's is {tuple(tensor.shape)}; "
                "it was saved with other model settings"
            )
    with _quiet():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)


def tensor_shapes(checkpoint):
    """dict from tensor name to shape, read off the headers alone."""
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}


def load_model(run_or_checkpoint, ema=True, device="cpu"):
    """A trained model, ready to evaluate.

    Args:
        run_or_checkpoint: a run's folder (its newest checkpoint) or a checkpoint's.
        ema: take the moving average of the weights instead of the weights.
        device: where to put it.

    Returns:
        (model, config, step): SiT in eval mode in float32, `Config`, and the number of steps trained. The model has an
        attribute `facts`: input_size, in_channels, num_classes, teacher_dims, teachers, class_names, latent.

    Raises:
        UsageError: no complete checkpoint there, or one that does not fit its settings.
    """
    checkpoint = find(run_or_checkpoint)
    config = load_config(checkpoint / "config.yaml")
    state = read_state(checkpoint)
    model = build_model(config, state["facts"])
    kind = "ema" if ema else "model"
    load_tensors(checkpoint, {f"{kind}/{name}": p.detach() for name, p in model.named_parameters()})
    model.facts = state["facts"]
    return model.to(device).eval().requires_grad_(False), config, state["step"]


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _quiet(warnings.catch_warnings):
    """DCP warns that no process group is there, which is what one process means."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        torch.set_warn_always(False)
