"""What a run starts from: its own last checkpoint, another one, or the weights of a file."""

import logging
import sys
from pathlib import Path

import torch.distributed as dist

from maskalign.checkpoints.layout import find, newest_sound
from maskalign.config import as_schedule
from maskalign.errors import UsageError
from maskalign.models.initial import assign
from maskalign.models.routing import keep_count

log = logging.getLogger(__name__)

# What a plain SiT lacks: it starts at its own initial values.
OWN_PARTS = ("mixer.", "fuse.", "projectors.", "class_embedder.", "final_layer.class_linear.")


def find_resume(config, placement):
    """Path of the checkpoint that `training.resume` asks for, None where the run begins.

    With `auto` the newest sound one; a damaged one is passed over, and said. All ranks come to the same answer.
    """
    resume = config.training.resume
    if resume == "never":
        return None
    if resume != "auto":
        return find(resume)

    def gather(value):
        values = [value] * placement.world_size
        if len(values) > 1:
            dist.all_gather_object(values, value)
        return values

    found, passed_over = newest_sound(Path(config.run_dir), (placement.rank, placement.world_size, gather))
    if passed_over and placement.is_main:
        print(f"maskalign: {passed_over}", file=sys.stderr, flush=True)
    return found


def check_facts(path, there, here):
    """Refuse a checkpoint of another data set's or teacher's shape.

    Args:
        path: of the checkpoint; there, here: `facts` of the checkpoint and of the settings.
    """
    for key in ("input_size", "in_channels", "num_classes", "teacher_dims", "class_dim"):
        if there.get(key) != here[key]:  # a run from before class tokens does not name their width
            raise UsageError(f"{path}: was trained with {key} {there.get(key)}, the settings give {here[key]}")


def warn_of_full_subset(method, tokens):
    """Say where rounding to `method.keep_multiple` makes a keep ratio below 1 keep all of so few tokens."""
    low = min(as_schedule(method.keep_ratio).ends)
    if low < 1 and keep_count(low, tokens, method.keep_multiple) == tokens:
        log.warning(
            "method.keep_multiple: keep ratio %g of %d tokens, in multiples of %d, keeps all of them; set it lower",
            low, tokens, method.keep_multiple,
        )  # fmt: skip


def init_from(model, path):
    """Start from the weights of a file (`training.init_from`). Only `OWN_PARTS` may be missing, or left unused.

    Args:
        model: `SiT`, spread over the ranks or not.
        path: a run, a checkpoint or a file of weights.

    Returns:
        A line that says what was loaded, what starts fresh and what of the file is not used.

    Raises:
        UsageError: the file cannot be read, or holds another architecture.
    """
    from maskalign.checkpoints.loading import load_weights

    weights = load_weights(path)
    own = dict(model.named_parameters())
    for name, tensor in weights.items():
        if name in own and own[name].shape != tensor.shape:
            raise UsageError(
                f"training.init_from: {path}: {name} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(own[name].shape)}"
            )
    missing = [name for name in own if name not in weights and not name.startswith(OWN_PARTS)]
    if missing:
        raise UsageError(f"training.init_from: {path} has no {missing[0]} ({len(missing)} missing); is it a SiT?")
    there = own.keys() | dict(model.named_buffers()).keys()
    unused = [name for name in weights if name not in there]
    foreign = [name for name in unused if not name.startswith(OWN_PARTS)]
    if foreign:
        raise UsageError(
            f"training.init_from: {path} has {foreign[0]} ({len(foreign)} such), which the model has not; "
            "its model.depth or other sizes differ"
        )
    for name, parameter in own.items():
        if name in weights:
            assign(parameter, weights[name])
    line = f"training.init_from: {len(own.keys() & weights.keys())} tensors of {path}"
    fresh = _parts(name for name in own if name not in weights)
    line += f"; starting fresh: {fresh}" if fresh else ""
    return line + (f"; not used: {_parts(unused)}" if unused else "")


def _parts(names):
    """The `OWN_PARTS` that names belong to, as text."""
    return ", ".join(dict.fromkeys(next(p for p in OWN_PARTS if name.startswith(p)).rstrip(".") for name in names))
