"""Checks that weights are available (a file, the cache or the hub), before anything heavy is imported."""

import os
import threading
import urllib.error
import urllib.request

from maskalign.config.teacher_names import DINOV2_SIZES
from maskalign.errors import UsageError

HUB_TIMEOUT = 5.0
SOURCES = ("hub", "random")


def hub_url():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def dinov2_model(name):
    """timm's name of the model behind "dinov2-b" and its siblings, with the tag of its weights."""
    return f"vit_{DINOV2_SIZES[name.removeprefix('dinov2-')]}_patch14_dinov2.lvd142m"


def check_weights(name, weights):
    """Raise a UsageError where a teacher's weights are not available; quick, and without importing torch.

    Args:
        name: the teacher, a valid name.
        weights: as for `load_teacher`.
    """
    if weights is not None and weights not in SOURCES:
        if not os.path.isfile(weights):
            raise UsageError(f"teacher {name}: there is no weights file {weights} (or say hub or random)")
    elif name.startswith("dinov2-") and weights != "random":
        check_hub(f"teacher {name}", f"timm/{dinov2_model(name)}", "its weights (a .safetensors or .pth file)")


def check_hub(what, repository, instead):
    """Raise a UsageError where a repository is neither in the cache nor on a hub that answers.

    Without this check the hub's client retries an unknown host for most of a minute.
    """
    if not in_cache(repository) and not hub_answers(hub_url()):
        raise UsageError(
            f"{what}: {repository} is not in the local cache and the hub {hub_url()} does not answer; "
            f"give a local path for {instead}"
        )


def in_cache(repository):
    """Whether the hub's client has some files of a repository on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return os.path.isdir(os.path.join(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots"))


def hub_answers(url, timeout=HUB_TIMEOUT):
    """Whether anything answers at `url` within `timeout` seconds, including the DNS lookup."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
        except urllib.error.HTTPError:
            answered.append(True)  # an error status is an answer too
        except (OSError, ValueError):
            return
        else:
            answered.append(True)

    # The DNS lookup has no timeout of its own, hence the thread.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answered)
