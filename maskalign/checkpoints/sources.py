"""Find a run or a checkpoint by a path, `hf-hub:USER/NAME[@REVISION][:FILE]`, or the name of published weights.

All commands that take a run or a checkpoint call `check_source`, which is fast and needs no torch, and `locate`, which
downloads files.
"""

import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Optional

from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.hub import hub_answers, hub_url, in_cache

PREFIX = "hf-hub:"
FORM = f"{PREFIX}USER/NAME, {PREFIX}USER/NAME@REVISION or {PREFIX}USER/NAME:FILE"
PICKLE_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")
ENDINGS = (*PICKLE_ENDINGS, ".safetensors")
EXPORT = "model.safetensors"  # name of the weights file that `maskalign push` writes


@dataclass(frozen=True)
class Published:
    """Weights that their authors published.

    Attributes:
        source: `hf-hub:` name, or the URL of a file.
        layout: as for `from_repa`.
        about: description of the weights.
        conversion: changes that are made when the weights are read.
        license: license as stated by the authors.
        vae: the VAE of the latents.
    """

    source: str
    layout: str
    about: str
    conversion: str
    license: str
    vae: str = "stabilityai/sd-vae-ft-mse"


PUBLISHED = {
    "repa-xl2": Published(
        "https://www.dl.dropboxusercontent.com/scl/fi/cxedbs4da5ugjq5wg3zrg/last.pt?rlkey=8otgrdkno0nd89po3dpwngwcc&dl=0",
        "repa",
        "REPA, SiT-XL/2, ImageNet 256, 4M steps, with its projector (from its authors' download, not the Hub)",
        "none: REPA's names are ours",
        "MIT (github.com/sihyun-yu/REPA)",
    ),
    "reg-xl2": Published(
        f"{PREFIX}Martinser/REG",
        "repa",
        "REG, SiT-XL/2 with a class token, ImageNet 256, 4M steps (the one file of weights in the repository)",
        "REG's names of the class token become ours, and its row of zeros in pos_embed is removed",
        "MIT (github.com/Martinser/REG)",
    ),
    "sit-xl2": Published(
        f"{PREFIX}nyu-visionx/SiT-collections:SiT-XL-2-256.pt",
        "sit",
        "SiT, SiT-XL/2, ImageNet 256, 7M steps, linear path",
        "the direction of time and the sign of the velocity are reversed, exactly; the predicted variance is dropped",
        "MIT (github.com/willisma/SiT)",
    ),
}


@dataclass(frozen=True)
class HubName:
    """The parts of `hf-hub:USER/NAME[@REVISION][:FILE]`."""

    repository: str
    revision: Optional[str] = None
    file: Optional[str] = None

    def __str__(self):
        return PREFIX + self.repository + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True)
class Located:
    """A source on this machine.

    Attributes:
        path: Path of a folder or a file.
        name: name of the source; None for a path.
        published: `Published` of known weights, else None.
    """

    path: Path
    name: Optional[str] = None
    published: Optional[Published] = None


def parse_hub_name(text):
    """`HubName` of a text, or None if the text does not begin with `hf-hub:`.

    Raises:
        UsageError: the text begins with `hf-hub:`, but is not a valid name.
    """
    text = str(text)
    if not text.startswith(PREFIX):
        return None
    part = r"[A-Za-z0-9][\w.-]*"
    found = re.fullmatch(rf"({part}/{part})(?:@([^:@\s]+))?(?::([^:\s]+))?", text.removeprefix(PREFIX))
    if not found or ".." in text:
        raise UsageError(f"{text}: not the name of weights on the Hub; write {FORM}")
    return HubName(*found.groups())


def is_remote(source):
    """True if a source is a name and not an existing path."""
    return str(source).startswith(PREFIX) or (str(source) in PUBLISHED and not Path(source).exists())


def check_source(source, option=None, what="a run folder, a checkpoint or a .pt file"):
    """Check that a path exists or that a name is valid; fast, and without torch.

    Args:
        source: path or name, as for `locate`.
        option: the setting with this source, for the message.
        what: the expected kinds of sources, for the message.

    Raises:
        UsageError: the path does not exist, or the name is not valid.
    """
    start = f"{option}: " if option else ""
    if is_remote(source):
        parse_hub_name(source)
        if find_spec("huggingface_hub") is None:
            raise UsageError(f"{start}{source} needs a package: pip install 'maskalign[hub]'")
    elif not Path(source).exists():
        near = get_close_matches(str(source), PUBLISHED, n=1, cutoff=0.75)
        hint = f"; did you mean the published weights {near[0]!r}?" if near else f"; give {what}"
        raise UsageError(f"{start}{source} does not exist{hint}")


def locate(source, what="a run folder, a checkpoint or a .pt file"):
    """Find a source on this machine. A path is returned unchanged; a name is read from the cache or downloaded.

    Args:
        source: path or name.
        what: the expected kinds of sources, for the message.

    Returns:
        Located.

    Raises:
        UsageError: the source does not exist, or there is no network to download it.
        RunError: the download failed.
    """
    check_source(source, what=what)
    if not is_remote(source):
        return Located(Path(source))
    published = PUBLISHED.get(str(source))
    if published is None:
        name = parse_hub_name(source)
        return Located(download(name), name.repository)
    name = parse_hub_name(published.source)
    path = download_url(published.source, str(source)) if name is None else download(name)
    return Located(path, str(source), published)


def download(name):
    """Download the file of a `HubName`, and return its path in the Hub client's cache.

    If the Hub does not answer, the file in the cache is used; otherwise the newest state of the revision.

    Raises:
        UsageError: the repository, revision or file does not exist, or there is no access or no network.
        RunError: the download failed.
    """
    import huggingface_hub
    from huggingface_hub import errors

    online = hub_answers(hub_url())
    if not online and not in_cache(name.repository):
        raise UsageError(
            f"{name}: not in the local cache, and the hub {hub_url()} does not answer; try again with a network, or "
            "give a local path"
        )
    try:
        file = name.file or _pick(name, online)
        own = dict(revision=name.revision)
        before = huggingface_hub.try_to_load_from_cache(name.repository, file, **own)
        path = Path(
            huggingface_hub.hf_hub_download(
                name.repository, file, endpoint=hub_url(), local_files_only=not online, **own
            )
        )
    except (errors.GatedRepoError, errors.RepositoryNotFoundError):
        raise UsageError(
            f"{name}: there is no such repository on {hub_url()}, or it is not public; for one of yours set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UsageError(f"{name}: the repository has no revision {name.revision!r}") from None
    except errors.LocalEntryNotFoundError as error:
        if online:
            raise _failed(name, error) from None
        raise UsageError(
            f"{name}: {name.file or 'its files'} cannot be fetched: the hub {hub_url()} does not answer, and the local "
            "cache does not have them; try again with a network, or give a local path"
        ) from None
    except errors.EntryNotFoundError:
        there = ", ".join(_list(name, online)[:12])
        raise UsageError(f"{name}: the repository has no file {name.file!r}; it has {there or 'none'}") from None
    except UsageError:
        raise
    except Exception as error:  # errors of the client, its HTTP library and the system
        raise _failed(name, error) from None
    if path.as_posix() != str(before):
        _check_digest(path, name, file)
    return path


def _failed(name, error):
    return RunError(f"{name}: the download failed ({one_line(error)[:200]}); the same command continues it")


def _list(name, online):
    """Names of a repository's files."""
    import huggingface_hub

    if online:
        return huggingface_hub.HfApi(endpoint=hub_url()).list_repo_files(name.repository, revision=name.revision)
    folder = huggingface_hub.snapshot_download(name.repository, revision=name.revision, local_files_only=True)
    return [path.relative_to(folder).as_posix() for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def _pick(name, online):
    """The name of the weights file in a repository, for a `HubName` without a file."""
    files = [file for file in _list(name, online) if file.endswith(ENDINGS)]
    if EXPORT in files:
        return EXPORT
    if len(files) == 1:
        return files[0]
    if not files:
        raise UsageError(f"{name}: the repository has no file of weights ({', '.join(ENDINGS)})")
    raise UsageError(
        f"{name}: the repository has {len(files)} files of weights; add one as :FILE: {', '.join(files[:8])}"
    )


def _check_digest(path, name, file):
    """Compare a new download with its checksum. The client's cache uses the checksum as the name of a large file."""
    from maskalign.checkpoints.layout import file_digest

    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name) and file_digest(blob)["sha256"] != blob.name:
        path.unlink(missing_ok=True)
        blob.unlink(missing_ok=True)
        raise RunError(f"{name}: {file} arrived damaged (its checksum is wrong); run the command again")


def download_url(url, name):
    """Download a published file that is not on a hub, and return its path in torch's cache.

    Raises:
        UsageError: the file is not in the cache and cannot be downloaded.
    """
    import torch

    path = Path(torch.hub.get_dir(), "checkpoints", f"maskalign-{name}.pt")
    if path.is_file():
        return path
    shown = url.partition("?")[0]
    if not hub_answers(url):
        raise UsageError(
            f"{name}: {shown} does not answer and {path} is not there; fetch the file elsewhere and give its path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, os.fspath(path), progress=False)
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{name}: {shown} cannot be fetched ({one_line(error)}); give a local path") from None
    return path


def published_table():
    """Text about the published weights that have a name."""
    lines = ["Published weights by name (maskalign convert NAME OUT, maskalign sample NAME --out DIR):"]
    for name, entry in PUBLISHED.items():
        lines += [
            "",
            f"{name}: {entry.about}",
            f"  from        {entry.source.partition('?')[0]}",
            f"  conversion  {entry.conversion}",
            f"  latents     {entry.vae}",
            f"  license     {entry.license}",
        ]
    return "\n".join([*lines, "", f"Other weights on the Hub: {FORM}"])
