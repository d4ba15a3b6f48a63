"""The sources of images: OpenMoji, a folder, an archive, webdataset shards, torchvision, Hugging Face data sets.

A source is listed as a sorted list of items with labels, and a picklable reader that any worker can call. No image is
decoded here.
"""

import hashlib
import os
import re
import sys

from maskalign.data.build.archives import TarReader, ZipReader, archive_kind, decompress, list_tar, list_zip
from maskalign.data.build.dataset_json import find_tables, group_by_table
from maskalign.data.build.folders import CLASS_FOLDERS, group_by_class
from maskalign.data.build.hub_source import open_hub
from maskalign.data.build.images import ENDINGS, MAX_BYTES, BadImage
from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import HOLES, check_names, check_text
from maskalign.data.build.listing import tell_passed, walk_folder
from maskalign.data.build.prepared import find_latents, take_latents
from maskalign.data.build.remote import open_urls
from maskalign.data.build.torchvision_source import open_torchvision
from maskalign.data.build.webdataset_source import find_shards, open_tars
from maskalign.errors import UsageError

ARCHIVES = (".tar", ".zip", ".gz", ".tgz", ".bz2", ".xz", ".txz", ".7z", ".rar", ".zst")


class NoImages(UsageError):
    """Raised for a source without a usable image; `rejected` is [(name, reason)] of files that look like images."""

    rejected = ()


def open_source(
    source,
    *,
    size=None,
    subset=None,
    class_names=None,
    class_folders=None,
    holes=None,
    root=None,
    scratch=None,
):
    """List a source.

    Args:
        source: "openmoji", "torchvision:NAME", "hf:NAME" (see `hub_source`), a folder, a .zip or .tar(.gz), webdataset
            shards (a folder of .tar files or a pattern such as "shards/{000..009}.tar", or one of URLs).
        size: side of the pictures in pixels, or None for the default of the source.
        subset: the part of the source to use, such as "train"; needed where it has several.
        class_names: names for the integer labels of webdataset shards or dataset.json. By default the numbers.
        class_folders: which folders are classes, see `folders.group_by_class`; one of CLASS_FOLDERS or None.
        holes: what to do with class numbers without an image, see `labels.number_classes`.
        root: folder where torchvision finds or downloads its files.
        scratch: folder for the decompressed copy of a compressed tar, or the copies of shards at URLs.

    Returns:
        The `Source`.

    Raises:
        UsageError: the source has no usable image, or its images or classes are ambiguous.
    """
    if class_folders is not None and class_folders not in CLASS_FOLDERS:
        raise UsageError(f"class_folders is {class_folders!r}; give one of {', '.join(CLASS_FOLDERS)}")
    if holes is not None and holes not in HOLES:
        raise UsageError(f"holes is {holes!r}; give keep or close")
    source = os.fspath(source)
    if class_names is not None:
        class_names = check_names(class_names, "class_names")
    labels = {"class_names": class_names, "holes": holes}
    folders = {"subset": subset, "class_folders": class_folders}
    if source == "openmoji":
        found = _openmoji(size or 32)
    elif source.startswith("torchvision:"):
        found = open_torchvision(source.removeprefix("torchvision:"), subset, root)
    elif source.startswith("hf:"):
        found = open_hub(source.removeprefix("hf:"), subset=subset, **labels)
    elif re.match(r"https?://", source):
        found = open_urls(source, scratch, **labels, **folders)
    elif re.match(r"[a-z0-9+]+:", source) and not os.path.exists(source):
        hint = "pipe: commands are refused" if source.startswith("pipe:") else "copy it to this machine first"
        raise UsageError(f"source {source!r} is not a local path; {hint}")
    elif re.search(r"[{*?]", source) and not os.path.exists(source):
        found = open_tars(source, find_shards(source), **labels, **folders)
    elif os.path.isdir(source):
        found = _folder(source, labels, folders, size)
    elif os.path.exists(source):
        found = _archive(source, labels, folders, scratch)
    else:
        raise UsageError(
            f"source {source!r} does not exist; give openmoji, torchvision:NAME, a folder, or a .zip or .tar of images"
        )
    found.name = found.name.encode("utf-8", "backslashreplace").decode()  # the name of a folder may not be UTF-8
    if not found.items:
        raise _no_images(source, found)
    if class_names is not None and not found.takes_names:
        raise UsageError(
            f"source {source} has its own class names; class_names is for webdataset shards and dataset.json"
        )
    if subset and not found.subsets:
        raise UsageError(f"source {source} has no subsets; omit --subset")
    for name in found.class_names:
        check_text(name, f"source {source}")
    return found


def _no_images(source, found):
    reasons = [f"{found.rejected[0][0]}: {found.rejected[0][1]}"] if found.rejected else []
    if found.passed:
        reasons.append(f"skipped: {tell_passed(found.passed)}")
    if len(found.passed) and any(ending in ARCHIVES for ending in found.passed):
        reasons.append("archives in it are not opened, unpack them")
    reason = f" ({'; '.join(reasons)})" if reasons else ""
    error = NoImages(
        f"source {source}: no images found{reason}; expected CLASS/IMAGE with one of the endings {', '.join(ENDINGS)}"
    )
    error.rejected = found.rejected
    return error


class EmojiReader:
    """Draws emoji; the position (`where`) of an item is its text."""

    def __init__(self, path, pixels):
        self.path, self.pixels = path, pixels

    def __call__(self, item):
        from maskalign.data.build.openmoji import draw_emoji

        return draw_emoji(item.where, self.pixels, self.path)


def _openmoji(size):
    from maskalign.data.build import openmoji

    path, version = openmoji.font_path()
    emoji = openmoji.list_emoji()
    names = sorted({category for _, _, category in emoji})
    items = sorted(Item(name, names.index(category), text) for name, text, category in emoji)
    # Drawn at a power of two times the size, so that halving by area is exact.
    reader = EmojiReader(path, size * (4 if size <= 64 else 2))
    return Source(
        f"OpenMoji {version}", names, items, reader, openmoji.LICENSE, identity=version, subsets=False, photos=False,
        how="the emoji's categories",
    )  # fmt: skip


class FolderReader:
    """Reads the files of a folder; an item's position is its path in the folder, or None if this is its name."""

    def __init__(self, root):
        self.root = root

    def __call__(self, item):
        path = os.path.join(self.root, item.where or item.name)
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise BadImage(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
        with open(path, "rb") as file:
            return file.read()


def _folder(root, labels, folders, size):
    listing = walk_folder(root)
    where = os.path.abspath(root)
    if not listing.images and any(name.lower().endswith(".parquet") for name, _ in listing.files):
        return open_hub(root, subset=folders["subset"], **labels)
    tars = [name for name, _ in listing.files if name.lower().endswith(".tar")]
    if tars and not listing.images:
        found = open_tars(root, [os.path.join(root, name) for name in tars], **labels, **folders)
        found.passed += listing.passed
        found.passed[".tar"] -= len(tars)
        found.passed += type(found.passed)()  # drops counts of 0
        found.rejected = sorted([*found.rejected, *listing.rejected])
        return found
    reader = FolderReader(root)

    def group():
        return _group(f"folder {os.path.basename(where)}", listing, reader, where, labels, folders)

    if folders["class_folders"] is None and find_latents(listing):
        return take_latents(group, listing, reader, root, where, labels, size)
    return group()


def _archive(path, labels, folders, scratch):
    kind = archive_kind(path)
    if kind is None:
        raise UsageError(f"source {path} is neither a folder nor a .zip or .tar archive")
    name = os.path.basename(path)
    stem = re.sub(r"\.(tar(\.[a-z0-9]+)?|tgz|tbz2|txz|zip)$", "", name, flags=re.IGNORECASE) or name
    identity = f"{os.path.getsize(path)} bytes"
    if kind == "zip":
        found = _group(f"archive {name}", list_zip(path), ZipReader(path), path, labels, folders, stem)
    else:
        if kind == "compressed tar":
            status = os.stat(path)
            mark = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
            plain = f"source-{hashlib.sha256(mark.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.tar"
            plain = os.path.join(scratch or os.path.dirname(os.path.abspath(path)), plain)
            if not os.path.exists(plain):
                print(f"decompressing {path} ...", file=sys.stderr, flush=True)
                decompress(path, plain)
        else:
            plain = path
        listing = list_tar(plain)
        if folders["class_folders"] is None and find_tables(listing, folders["subset"]):
            found = _group(f"archive {name}", listing, TarReader([plain]), path, labels, folders, stem)
        else:
            found = open_tars(path, [plain], **labels, **folders, stem=stem, first=listing)
    found.identity = identity
    return found


def _group(name, listing, reader, where, labels, folders, stem=None):
    """Make a Source from a listing, with labels from dataset.json if there is one, else from folders."""
    tables = find_tables(listing, folders["subset"]) if folders["class_folders"] is None else {}
    if tables:
        return group_by_table(name, listing, reader, tables, subset=folders["subset"], where=where, **labels)
    return group_by_class(name, listing, reader, where=where, stem=stem, **folders)
