"""Networks for teachers: built by timm, with weights from the hub, from a local file, or random for tests.

Files are read with safetensors or `torch.load(weights_only=True)`, which run no code from the file.
"""

import pickle
from pathlib import Path

import torch

from maskalign.errors import UsageError, one_line
from maskalign.runtime.hub import check_hub, hub_url
from maskalign.teachers.hub import SOURCES, WITHOUT_HUB

RANDOM_SEED = 0


def build_network(model, weights, *, teacher, **kwargs):
    """A timm network in eval mode.

    Args:
        model: timm's name of the model, with the tag of its weights or without.
        weights: "hub", "random", or the path of a .safetensors / .pth file.
        teacher: the teacher's name for error messages.
        **kwargs: for `timm.create_model`.
    """
    import timm

    if not model.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(model):
        near = timm.list_models(f"*{model.split('.')[0]}*")[:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
        raise UsageError(f"teacher {teacher}: timm has no model {model!r}; {hint}")
    try:
        if weights == "random":
            # A fixed seed: every rank, worker and restart must have the same teacher.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(RANDOM_SEED)
                network = timm.create_model(model, pretrained=False, **kwargs)
        elif weights == "hub":
            network = _from_hub(model, teacher, kwargs)
        else:
            network = _from_state_dict(model, read_state_dict(weights, teacher), kwargs)
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError) as error:
        if isinstance(error, UsageError):
            raise
        where = weights if weights in SOURCES else f"weights {weights}"
        raise UsageError(f"teacher {teacher}: {where} do not fit timm's {model}: {_short(error)}") from None
    return network.eval()


def read_state_dict(path, teacher):
    """The tensors of a .safetensors, .pth, .pt or .bin file, by name, in the order of the file."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"teacher {teacher}: there is no weights file {path} (or say hub or random)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"teacher {teacher}: {path} is damaged or holds more than tensors, which is refused because it "
            "could run code; save its state_dict, or a .safetensors file"
        ) from None
    except Exception as error:  # what damaged files raise is not documented by either library
        raise UsageError(f"teacher {teacher}: cannot read weights {path}: {_short(error)}") from None
    for key in ("state_dict", "model", "teacher"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UsageError(f"teacher {teacher}: {path} is not a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def _from_state_dict(model, state, kwargs):
    """Load tensors as timm loads a download: names of other layouts mapped, position embeddings resampled.

    Every tensor of the network must be there and nothing else, but for the classifier, which a teacher does not use.
    """
    import timm

    cfg = timm.get_pretrained_cfg(model)
    heads = getattr(cfg, "classifier", None) or ()
    heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {name: tensor for name, tensor in state.items() if not name.startswith(heads)} if heads else state
    # A state_dict in the overlay replaces timm's download. If the number of classes differs from its config, timm no
    # longer checks that all tensors fit, and random ones would go unnoticed: hence 0 classes on both sides.
    overlay = {"state_dict": state, "num_classes": 0}
    return timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs | {"num_classes": 0})


def _from_hub(model, teacher, kwargs):
    import timm
    from huggingface_hub import try_to_load_from_cache

    if model.startswith(("hf-hub:", "hf_hub:")):
        repository = model.split(":", 1)[1].split("@")[0]
    else:
        cfg = timm.get_pretrained_cfg(model)
        repository = cfg.hf_hub_id if cfg is not None else None
        if cfg is None or not (repository or cfg.url):
            raise UsageError(f"teacher {teacher}: the hub has no weights of {model}; give a file")
        if repository:
            cached = try_to_load_from_cache(repository, "model.safetensors")
            if isinstance(cached, str):
                # Without contacting the hub, whose client would wait where there is no network.
                return _from_state_dict(model, read_state_dict(cached, teacher), kwargs)
    check_hub(f"teacher {teacher}", repository or model, WITHOUT_HUB)
    try:
        return timm.create_model(model, pretrained=True, **kwargs)
    except OSError as error:
        raise UsageError(f"teacher {teacher}: no weights of {model} from {hub_url()}: {_short(error)}") from None


def _short(error, limit=300):
    text = one_line(error)
    return text if len(text) <= limit else text[:limit] + "..."
