"""Make classes from folder names: the top folders, as in torchvision's ImageFolder, or as the user specifies."""

import os
import re
from collections import Counter

from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import in_order, is_number
from maskalign.errors import UsageError

CLASS_FOLDERS = ("top", "leaf", "path", "none")
SPLIT = re.compile(r"(train|training|test|testing|val|valid|validation|dev|eval|extra)[-_ ]?\d*", re.IGNORECASE)
INNER = {"images", "image", "imgs", "img"}  # CLASS/images/IMAGE, as in Tiny ImageNet
FEW = 0.1  # If a folder holds a smaller share of its pictures directly, its subfolders may be the classes.


def group_by_class(name, listing, reader, *, subset=None, where, class_folders=None, stem=None):
    """Make a Source from a listing of PREFIX/CLASS/.../IMAGE.

    Folders that contain all classes are removed from the paths. In the remaining path, an image's class is the top
    folder ("top", torchvision's rule), the folder that holds the image ("leaf"), or all folders joined ("path"). With
    "none", all images are one class. Images outside of any folder are one class.

    Args:
        name: name of the source, for the manifest.
        listing: `Listing` of all its files.
        reader: see `Source`.
        subset: one or more folder names, such as "train" or "cifar10/train"; only images below it are used.
        where: the source's path, for messages.
        class_folders: one of CLASS_FOLDERS. None is the same as "top", but raises an error for folders that are
            probably not classes.
        stem: name of the class where there is only one; the default is the last part of `where`.

    Raises:
        UsageError: train and test images would be mixed, or the folders are ambiguous.
    """
    wanted = [part for part in (subset or "").split("/") if part]
    rejected, images, flat, available = list(listing.rejected), [], [], Counter()
    for path, place in listing.images:
        folders = _class_folders(path)
        available[_part_of(folders)] += 1
        if wanted:
            below = [i for i in range(len(folders)) if folders[i : i + len(wanted)] == wanted]
            if not below:
                continue
            folders = folders[: below[0]] + folders[below[0] + len(wanted) :]
        (images if folders else flat).append((path, folders, place))
    parts = ", ".join(f"{part or '.'} ({count:,} images)" for part, count in sorted(available.items())[:8])
    if wanted:
        inside = f"/{'/'.join(wanted)}/"
        rejected = [entry for entry in rejected if inside in f"/{entry[0]}"]
        if not images and not flat:
            raise UsageError(f"source {where}: no images below {subset!r}; found: {parts or 'none at all'}")
    if class_folders != "top" and class_folders != "path":
        _refuse_mixing([folders for _, folders, _ in images], where, parts, class_folders)
    if class_folders is None:
        _refuse_running_folders(images, where)
    name += f", {subset}" if subset else ""
    stem = stem or os.path.basename(os.path.abspath(where))
    if class_folders == "none" or not images:
        items = sorted(Item(path, 0, place) for path, _, place in images + flat)
        how = "a flat folder" if not images else "--class-folders none"
        found = Source(name, [wanted[-1] if wanted else stem], items, reader, rejected=sorted(rejected), how=how)
        if items and not images:
            found.notes.append("no picture lies in a class folder: all are one class, without labels to learn")
        found.passed = listing.passed
        return found
    rejected += [(path, "lies outside any class folder") for path, _, _ in flat]
    prefix, images = _take_off(images, where, class_folders)
    labeled, notes = _name_images(images, where, class_folders or "top")
    names = in_order(label for _, label, _ in labeled)
    number = {label: index for index, label in enumerate(names)}
    items = sorted(Item(path, number[label], place) for path, label, place in labeled)
    how = {"leaf": "the folders of the pictures", "path": "the paths of folders"}.get(class_folders, "the top folders")
    if prefix:
        how += f" of {'/'.join(prefix)}"
    found = Source(name, names, items, reader, rejected=sorted(rejected), notes=notes, how=how)
    found.passed = listing.passed
    found.empty = [] if wanted else _empty(listing.folders, prefix, labeled)
    if all(map(is_number, names)) and any(int(name) != label for label, name in enumerate(names)):
        found.notes.append(
            f"the class names are numbers that differ from the labels: label 0 is class {names[0]!r}, and "
            f"label {len(names) - 1} is class {names[-1]!r}"
        )
    found.notes += _alike(names)
    return found


def _class_folders(path):
    """The folders above an image, without a last folder such as "images" inside a class."""
    folders = path.split("/")[:-1]
    return folders[:-1] if len(folders) > 1 and folders[-1].lower() in INNER else folders


def _part_of(folders):
    """A name for --subset that selects an image: its path down to a folder such as train, or its top folder."""
    for number, folder in enumerate(folders):
        if SPLIT.fullmatch(folder):
            return "/".join(folders[: number + 1])
    return "/".join(folders[:1])


def _refuse_mixing(all_folders, where, parts, class_folders):
    """Raise a UsageError where training and test images would be in one data set."""
    marks = {tuple(f for f in folders if SPLIT.fullmatch(f)) if len(folders) > 1 else () for folders in all_folders}
    tops = {folders[0] for folders in all_folders}
    flat = len(tops) > 1 and all(SPLIT.fullmatch(top) for top in tops)
    if len(marks) > 1 or flat and class_folders != "none":
        first = sorted({mark for mark in marks if mark} or {(top,) for top in tops})[-1][0]
        raise UsageError(
            f"source {where}: the images are in several folders: {parts}; choose one with --subset, for example "
            f"--subset {first}, or give --class-folders top if these are the classes"
        )


def _refuse_running_folders(images, where):
    """Raise a UsageError for paths such as 00000/img00000000.png, whose folders count thousands of images."""
    tops = {folders[-1] for _, folders, _ in images}
    if not tops or not all(re.fullmatch(r"\d{5}", top) for top in tops):
        return
    for path, folders, _ in images:
        digits = re.fullmatch(r"(?:img)?(\d{8,9})\.[A-Za-z]+", path.rpartition("/")[2])
        if not digits or not digits[1].startswith(folders[-1]):
            return
    raise UsageError(
        f"source {where}: the folders ({min(tops)} to {max(tops)}) only number the images, as in the EDM / REPA layout "
        "or img2dataset's, and are not classes; put dataset.json with the labels beside them, or give --class-folders "
        "none for one class, or top to use them as classes"
    )


def _take_off(images, where, class_folders):
    """(folders that contain all classes, images with these folders removed from their paths)."""
    prefix = []
    while len({folders[0] for _, folders, _ in images}) == 1 and all(len(folders) > 1 for _, folders, _ in images):
        prefix.append(images[0][1][0])
        images = [(path, folders[1:], place) for path, folders, place in images]
    tops = {folders[0] for _, folders, _ in images}
    own = sum(len(folders) == 1 for _, folders, _ in images)
    below = sorted({folders[1] for _, folders, _ in images if len(folders) > 1})
    if class_folders is None and len(tops) == 1 and len(below) > 1 and own < FEW * len(images):
        (top,) = tops
        raise UsageError(
            f"source {where}: {top} directly contains {own:,} pictures, and {len(images) - own:,} in {len(below):,} "
            f"folders ({', '.join(below[:3])}, ...); give --class-folders top for the one class {top}, path for a "
            f"class of each folder, or move the {own:,} pictures away"
        )
    return prefix, images


def _name_images(images, where, class_folders):
    """([(path, class name, place)], notes)."""
    if class_folders == "top":
        deep = Counter(folders[0] for _, folders, _ in images if len(folders) > 1)
        notes = []
        if deep:
            examples = ", ".join(sorted({"/".join(folders) for _, folders, _ in images if len(folders) > 1})[:3])
            notes.append(
                f"{sum(deep.values()):,} pictures lie in folders below that of their class ({examples}, ...), which "
                "are ignored; --class-folders path makes each of them a class, leaf makes a class of each folder name"
            )
        return [(path, folders[0], place) for path, folders, place in images], notes
    if class_folders == "path":
        return [(path, "/".join(folders), place) for path, folders, place in images], []
    home = {}
    for _, folders, _ in images:
        other = home.setdefault(folders[-1], folders)
        if other != folders:
            raise UsageError(
                f"source {where}: {'/'.join(other)} and {'/'.join(folders)} have the same last folder; give "
                "--class-folders path to separate them, or --subset for one of several parts"
            )
    return [(path, folders[-1], place) for path, folders, place in images], []


def _empty(folders, prefix, labeled):
    """Folders next to those of the classes that hold no image. Because of them, labels differ from folder positions."""
    full = {path[:end] for path, _, _ in labeled for end in range(len(path)) if path[end] == "/"}
    depth = len(prefix) + 1
    beside = (path for path in folders if path.count("/") + 1 == depth and path.split("/")[:-1] == prefix)
    return sorted(path for path in beside if path not in full and not path.rpartition("/")[2].startswith("."))


def _alike(names):
    """A note where two class names differ only in case, spaces or equivalent Unicode characters."""
    from unicodedata import normalize

    first = {}
    for name in names:
        other = first.setdefault(" ".join(normalize("NFKC", name).casefold().split()), name)
        if other != name:
            return [f"{other!r} and {name!r} are two classes; put their pictures into one folder if they are the same"]
    return []
