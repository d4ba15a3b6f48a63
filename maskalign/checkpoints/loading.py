"""Load models from runs, checkpoints and weight files, and load a checkpoint's tensors into a training run."""

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Dict, Optional, Union

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.conversion import own_name, to_repa
from maskalign.checkpoints.layout import find, read_state
from maskalign.checkpoints.sources import locate
from maskalign.checkpoints.spec import ModelInfo, ModelSpec
from maskalign.checkpoints.weight_files import load_file
from maskalign.config import Config, load_config
from maskalign.errors import RunError, UsageError
from maskalign.models.sit import SiT


@dataclass
class Loaded:
    """A loaded model with its settings and information.

    Attributes:
        model: `SiT` in eval mode, on the CPU, without gradients.
        kind: `run`, `checkpoint` or `file`.
        source: Path of the checkpoint's folder or of the file.
        folder: Path of the run; None for a file.
        config: the run's `Config`; None for a file.
        info: `ModelInfo`.
        spec: the checkpoint's `ModelSpec`; None for a file.
    """

    model: SiT
    kind: str
    source: Path
    folder: Optional[Path]
    config: Optional[Config]
    info: ModelInfo
    spec: Optional[ModelSpec] = None


def load(path: Union[str, Path], ema: bool = True, heads: Optional[int] = None) -> Loaded:
    """Load a trained model with its settings and information.

    Args:
        path: a run folder (its newest complete checkpoint is used), a checkpoint folder (saved with any plan and number
            of ranks), a file of weights (.pt of REPA, REG or SiT, .safetensors), or a name that `sources.locate` knows:
            `hf-hub:USER/NAME[@REVISION][:FILE]`, or the name of published weights.
        ema: load the moving average of the weights. If a file has only one set of weights, it is loaded.
        heads: number of attention heads, for a file that does not contain it and whose sizes are no preset's.

    Returns:
        Loaded.

    Raises:
        HeadsUnknown: `heads` is required.
        UsageError: the path cannot be loaded, or the weights do not fit their settings.
    """
    located = locate(path)
    path = located.path
    if not path.is_dir():
        model, info = load_file(path, ema, heads=heads, published=located.published)
        return Loaded(model, "file", path, None, None, replace(info, name=located.name or info.name))
    checkpoint = find(path)
    config = read_config(checkpoint)
    state = read_state(checkpoint)
    spec = ModelSpec.from_dict(state["facts"])
    model = build_model(config, spec)
    if heads not in (None, model.heads):
        raise UsageError(f"{path}: this run has {model.heads} attention heads; leave out the heads ({heads})")
    kind = "ema" if ema else "model"
    load_tensors(checkpoint, {f"{kind}/{name}": p.detach() for name, p in model.named_parameters()})
    run = path if checkpoint != path else path.resolve().parent.parent
    info = ModelInfo(
        name=run.resolve().name or path.name,
        step=state["step"],
        ema=ema,
        path=config.objective.path,
        class_names=spec.class_names,
        latent=spec.latent,
        vae=config.preview.vae,
        teachers=spec.teachers or [],
    )
    kind = "run" if checkpoint != path else "checkpoint"
    return Loaded(model.eval().requires_grad_(False), kind, checkpoint, run, config, info, spec)


def read_config(checkpoint):
    """The settings that a checkpoint was trained with.

    Raises:
        UsageError: the settings cannot be read.
    """
    import yaml

    path = Path(checkpoint, "config.yaml")
    config = load_config(path)
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "mixer_layers" not in (written.get("model") or {}):
        config.model.mixer_layers = 1  # before this setting existed, the attention mixer had one layer
    return config


def load_model(
    path: Union[str, Path], ema: bool = True, device: Union[str, torch.device] = "cpu", heads: Optional[int] = None
) -> SiT:
    """Load the model of a run, a checkpoint or a file of weights for sampling.

    Args:
        path, ema, heads: as for `load`.
        device: device of the model.

    Returns:
        SiT in eval mode, without gradients.

    Raises:
        HeadsUnknown: `heads` is required.
        UsageError: the path cannot be loaded, or the weights do not fit their settings.
    """
    return load(path, ema, heads).model.to(device)


def load_weights(path: Union[str, Path]) -> Dict[str, torch.Tensor]:
    """Load the averaged weights at `path`, see `load`, as a dict from our parameter names to tensors."""
    return to_repa(load_model(path))


def load_tensors(checkpoint, tensors):
    """Load a checkpoint into a flat dict of tensors in place. With FSDP they are DTensors, and each rank reads its
    shards.

    The number of ranks and the plan may differ from those of the save. The ranks do not communicate.

    Args:
        checkpoint: folder of the checkpoint.
        tensors: dict from `kind/parameter` to tensor.

    Raises:
        UsageError: a tensor is missing or has another shape, because the settings are not those of the checkpoint.
        RunError: the files cannot be read.
    """
    saved = tensor_shapes(checkpoint)
    # dict from our names to the names in the checkpoint, which differ for checkpoints of earlier versions.
    parts = (full.rpartition("/") for full in saved)
    stored = {f"{kind}{slash}{own_name(name)}": f"{kind}{slash}{name}" for kind, slash, name in parts}
    for name, tensor in tensors.items():
        if name not in stored:
            raise UsageError(
                f"{checkpoint}: has no tensor {name}; it was saved with other model settings{_of_mixer(name, stored)}"
            )
        shape = tuple(saved[stored[name]])
        if shape != tuple(tensor.shape):
            raise UsageError(
                f"{checkpoint}: {name} has shape {shape}, the model's is {tuple(tensor.shape)}; "
                "it was saved with other model settings"
            )
    tensors = {stored[name]: tensor for name, tensor in tensors.items()}
    try:
        with ignoring_warnings():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    except CheckpointException as error:  # a BaseException, which `except Exception` does not catch
        reason = next(iter(error.failures.values()))[0]
        raise RunError(f"{checkpoint}: its tensors cannot be read ({reason}); choose another checkpoint") from None


def _of_mixer(name, stored):
    """Text about the number of mixing layers in the checkpoint, if `name` is a tensor of a mixing layer."""
    found = re.match(r"(\w+/mixer\.layers\.)\d", name)
    numbers = [re.match(rf"{re.escape(found.group(1))}(\d+)", other) for other in stored] if found else []
    layers = max((int(number.group(1)) + 1 for number in numbers if number), default=0)
    return f" (model.mixer_layers {layers})" if layers else ""


def tensor_shapes(checkpoint):
    """dict from tensor name to shape; only the headers of the files are read."""
    metadata = HuggingFaceStorageReader(str(checkpoint)).read_metadata()
    return {name: entry.size for name, entry in metadata.state_dict_metadata.items()}


class ignoring_warnings(warnings.catch_warnings):
    """Context for calls of DCP, which warns if there is no process group, even though one process needs none."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
        torch.set_warn_always(False)
