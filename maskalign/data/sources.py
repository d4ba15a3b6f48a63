"""Where images come from: OpenMoji, a folder, an archive, webdataset shards, torchvision.

Each source becomes a sorted list of items with labels, plus a picklable reader that any worker can call.
Sources only list; nothing is decoded here.
"""

import hashlib
import os
import re
import sys

from maskalign.data.archives import TarReader, ZipReader, archive_kind, decompress, list_tar, list_zip
from maskalign.data.images import ENDINGS, MAX_BYTES, BadImage
from maskalign.data.items import Item, Source, empty_classes, group_by_class, is_image
from maskalign.data.torchvision_source import open_torchvision
from maskalign.data.webdataset_source import open_webdataset
from maskalign.errors import UsageError


def open_source(source, *, size, subset=None, class_names=None, root=None, scratch=None):
    """List a source.

    Args:
        source: "openmoji", "torchvision:NAME", a folder, a .zip or .tar(.gz), webdataset shards (a folder of .tar
            files or a pattern such as "shards/{000..009}.tar").
        size: side in pixels that the images will have (OpenMoji is drawn to suit it).
        subset: the part of the source to take, as "train"; needed where it has several.
        class_names: names for webdataset's integer labels; numbers where left out.
        root: folder where torchvision has, or puts, its files.
        scratch: folder for the plain copy of a compressed tar.

    Raises:
        UsageError: there is nothing usable there, or it is not clear which images or classes are meant.
    """
    source = os.fspath(source)
    if source == "openmoji":
        found = _openmoji(size)
    elif source.startswith("torchvision:"):
        found = open_torchvision(source.removeprefix("torchvision:"), subset, root)
    elif re.match(r"[a-z0-9+]+:", source) and not os.path.exists(source):
        hint = "pipe: commands are refused" if source.startswith("pipe:") else "copy it to this machine first"
        raise UsageError(f"source {source!r} is not a local path; {hint}")
    elif re.search(r"[{*?]", source) and not os.path.exists(source):
        found = open_webdataset(source, class_names)
    elif os.path.isdir(source):
        found = _folder(source, subset, class_names)
    elif os.path.exists(source):
        found = _archive(source, subset, class_names, scratch)
    else:
        raise UsageError(
            f"source {source!r} does not exist; give openmoji, torchvision:NAME, a folder, or a .zip or .tar of images"
        )
    if not found.items:
        reason = f" ({found.rejected[0][0]}: {found.rejected[0][1]})" if found.rejected else ""
        raise UsageError(
            f"source {source}: no images in class folders found{reason}; expected CLASS/IMAGE with one of the "
            f"endings {', '.join(ENDINGS)}"
        )
    kind = found.name.partition(" ")[0]
    if class_names is not None and kind != "webdataset":
        raise UsageError(f"source {source} names its own classes; class_names is for webdataset shards")
    if subset and kind in ("OpenMoji", "webdataset"):
        raise UsageError(f"source {source} has no subsets; leave --subset out")
    return found


class EmojiReader:
    """Draws emoji; an item's `where` is its text."""

    def __init__(self, path, pixels):
        self.path, self.pixels = path, pixels

    def __call__(self, item):
        from maskalign.data.openmoji import draw_emoji

        return draw_emoji(item.where, self.pixels, self.path)


def _openmoji(size):
    from maskalign.data import openmoji

    path, version = openmoji.font_path()
    emoji = openmoji.list_emoji()
    names = sorted({category for _, _, category in emoji})
    items = sorted(Item(name, names.index(category), text) for name, text, category in emoji)
    # Drawn at a power of two times the size: halving by area is then exact.
    reader = EmojiReader(path, size * (4 if size <= 64 else 2))
    return Source(f"OpenMoji {version}", names, items, reader, openmoji.LICENSE, identity=version)


class FolderReader:
    """Reads the files of a folder; an item's name is its path below it."""

    def __init__(self, root):
        self.root = root

    def __call__(self, item):
        path = os.path.join(self.root, item.name)
        size = os.path.getsize(path)
        if size > MAX_BYTES:
            raise BadImage(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
        with open(path, "rb") as file:
            return file.read()


def _folder(root, subset, class_names):
    files, tars, all_folders = [], [], []
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back into the tree
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        relative = os.path.relpath(folder, root)
        if relative != ".":
            all_folders.append(relative)
        for name in names:
            path = name if relative == "." else f"{relative}/{name}"
            if name.endswith(".tar"):
                tars.append(path)
            elif is_image(path) and os.path.isfile(os.path.join(folder, name)):
                files.append((path, None))
    if tars and not files:
        return open_webdataset(root, class_names)
    what = os.path.basename(os.path.abspath(root))
    found = group_by_class(f"folder {what}", files, FolderReader(root), subset, os.path.abspath(root))
    found.empty = empty_classes(all_folders, found.items)
    return found


def _archive(path, subset, class_names, scratch):
    kind = archive_kind(path)
    if kind is None:
        raise UsageError(f"source {path} is neither a folder nor a .zip or .tar archive")
    name = f"archive {os.path.basename(path)}"
    identity = f"{os.path.getsize(path)} bytes"
    if kind == "zip":
        found = group_by_class(name, list_zip(path), ZipReader(path), subset, path)
    else:
        if kind == "compressed tar":
            status = os.stat(path)
            mark = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
            plain = f"source-{hashlib.sha256(mark.encode()).hexdigest()[:16]}.tar"
            plain = os.path.join(scratch or os.path.dirname(os.path.abspath(path)), plain)
            if not os.path.exists(plain):
                print(f"unpacking the compression of {path} ...", file=sys.stderr, flush=True)
                decompress(path, plain)
            path = plain
        members = list(list_tar(path))
        if any(re.search(r"\.(cls|json)$", member) for member, _ in members):
            return open_webdataset(path, class_names)
        found = group_by_class(name, members, TarReader([path]), subset, path)
    found.identity = identity
    return found
