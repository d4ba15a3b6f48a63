"""What a source of images is, and how folder names become classes."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from maskalign.data.images import ENDINGS
from maskalign.errors import UsageError

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval", "extra"}
INNER = {"images", "image", "imgs", "img"}  # CLASS/images/IMAGE, as in Tiny ImageNet


class Item(NamedTuple):
    """One image: its name for messages and for the order, its label, and where the reader finds it."""

    name: str
    label: int
    where: Any = None


@dataclass
class Source:
    """A listed source.

    Attributes:
        name: what the manifest says about the origin; no folders of this machine.
        class_names: label i is `class_names[i]`.
        items: the images, sorted by name.
        reader: called with an item, gives the file's bytes or a PIL image; picklable.
        license: licence and attribution, None where unknown.
        rejected: (name, reason) of what looked like an image but cannot be one of the data set.
        empty: folders that would be classes, but hold no image.
        identity: enters the plan's fingerprint, beside the items.
    """

    name: str
    class_names: list[str]
    items: list[Item]
    reader: Any
    license: str | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    identity: str = ""


def is_image(path):
    """Whether a path in a source names an image file, and neither a hidden one nor macOS's shadow of one."""
    parts = path.split("/")
    hidden = any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].rpartition(".")[2].lower() in ENDINGS and "." in parts[-1]


def _class_folder(path):
    """The folders above an image, that of its class last."""
    folders = [part for part in path.split("/")[:-1] if part not in ("", ".")]
    return folders[:-1] if len(folders) > 1 and folders[-1].lower() in INNER else folders


def group_by_class(name, files, reader, subset, where):
    """Make a Source of files PREFIX/CLASS/IMAGE: the folder of an image is its class.

    Args:
        name: of the source, for the manifest.
        files: iterable of (path, place for the reader); others than images are passed over.
        reader: see `Source`.
        subset: one or more folder names, as "train" or "cifar10/train"; only images below it count.
        where: the source's path, for messages.

    Raises:
        UsageError: train and test images, or the same class below several folders, would be mixed.
    """
    wanted = [part for part in (subset or "").split("/") if part]
    images, rejected, prefixes = [], [], Counter()
    available = Counter()
    for path, place in files:
        if not is_image(path):
            continue
        folders = _class_folder(path)
        available["/".join(folders[:-1])] += 1
        if wanted:
            below = [i + len(wanted) for i in range(len(folders)) if folders[i : i + len(wanted)] == wanted]
            if not below:
                continue
            folders = folders[below[0] :]
            if not folders:
                rejected.append((path, "lies outside any class folder"))
                continue
        if not folders:
            rejected.append((path, "lies outside any class folder"))
            continue
        prefix = "/".join(folders[:-1])
        prefixes[prefix] += 1
        images.append((path, folders[-1], prefix, place))
    parts = sorted(available.items())[:8]
    parts = ", ".join(f"{prefix or '.'} ({count:,} images)" for prefix, count in parts)
    if wanted and not images:
        raise UsageError(f"source {where}: no images below {subset!r}; there are: {parts or 'none at all'}")
    _refuse_mixing(images, prefixes, where, parts)
    names = sorted({label for _, label, _, _ in images})
    number = {label: index for index, label in enumerate(names)}
    items = sorted(Item(path, number[label], place) for path, label, _, place in images)
    name += f", {subset}" if subset else ""
    return Source(name, names, items, reader, rejected=sorted(rejected))


def empty_classes(folders, items):
    """Of all folders of a source those beside its classes' that hold no image: its labels are not what they look like.

    Args:
        folders: paths of all folders; items: the images taken, named by path.
    """
    classes = {"/".join(_class_folder(item.name)) for item in items}
    full = {path[:end] for path in classes for end in range(len(path) + 1) if path[end : end + 1] in ("", "/")}
    parents = {path.rpartition("/")[0] for path in classes}
    beside = (path for path in folders if path.rpartition("/")[0] in parents and path not in full)
    return sorted(path for path in beside if is_image(f"{path}/any.png"))  # no hidden ones


def _refuse_mixing(images, prefixes, where, parts):
    if len(prefixes) < 2:
        return
    splits = any(part.lower() in SPLITS for prefix in prefixes for part in prefix.split("/"))
    home = {}
    shared = any(home.setdefault(label, prefix) != prefix for _, label, prefix, _ in images)
    if splits or shared:
        raise UsageError(
            f"source {where}: images sit under several folders: {parts}; choose one with --subset, as in "
            f"--subset {sorted(prefixes)[-1]}"
        )
