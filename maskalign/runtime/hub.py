"""Check that a model hub can be reached, before heavy imports and before the hub's client waits for a long time."""

import os
import threading
import urllib.error
import urllib.request

from maskalign.errors import UsageError

HUB_TIMEOUT = 5.0


def hub_url():
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def check_hub(what, repository, instead):
    """Raise a UsageError if a repository is not in the cache and the hub does not answer.

    Without this check the hub's client retries an unknown host for most of a minute.

    Args:
        what: the setting, at the beginning of the message.
        repository: name of the repository on the hub.
        instead: the setting that also accepts a local path, for the message.
    """
    if not in_cache(repository) and not hub_answers(hub_url()):
        raise UsageError(
            f"{what}: {repository} is not in the local cache and the hub {hub_url()} does not answer; "
            f"give a local path for {instead}"
        )


def in_cache(repository):
    """True if the hub's client has files of a repository in its cache on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return os.path.isdir(os.path.join(HF_HUB_CACHE, f"models--{repository.replace('/', '--')}", "snapshots"))


def hub_answers(url, timeout=HUB_TIMEOUT):
    """True if a server answers at `url` within `timeout` seconds, including the DNS lookup."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout).close()
        except urllib.error.HTTPError:
            answered.append(True)  # an error status is also an answer
        except (OSError, ValueError):
            return
        else:
            answered.append(True)

    # A thread is used because the DNS lookup has no timeout of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answered)
