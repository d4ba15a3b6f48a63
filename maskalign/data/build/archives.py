"""List zip and tar archives, and read single members by their position. Nothing is extracted to disk.

A tar is walked once. After that, a member is (tar number, offset, size) and is read without tarfile.
"""

import bz2
import gzip
import lzma
import os
import posixpath
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from functools import lru_cache

from maskalign.data.build.images import MAX_BYTES, BadImage
from maskalign.data.build.listing import Listing, clean_name, has_image_ending
from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import sync_file, sync_folder

COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
MAX_LINKS = 8  # the longest chain of links to links that is followed


def archive_kind(path):
    """The kind of an archive, from its content and not its name: "zip", "tar", "compressed tar" or None.

    Raises:
        UsageError: the file cannot be read, or is a zip that is damaged or truncated.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UsageError(f"source {path}: cannot be read ({error.strerror})") from None
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        return "zip"
    if start[:4] == b"PK\x03\x04":
        raise UsageError(f"source {path}: the zip archive is damaged or truncated")
    if any(start.startswith(magic) for magic in COMPRESSIONS):
        return "compressed tar"
    try:
        return "tar" if tarfile.is_tarfile(path) else None
    except Exception:  # damaged headers make tarfile raise more than its own errors
        return None


def decompress(path, target):
    """Decompress a tar.gz, .bz2 or .xz into the plain tar `target`, which is written atomically.

    Images are read in random order, which a compressed stream does not allow.

    Raises:
        RunError: the file is damaged or truncated.
    """
    with open(path, "rb") as file:
        start = file.read(8)
    opener = next(opener for magic, opener in COMPRESSIONS.items() if start.startswith(magic))
    temporary = f"{target}.{os.getpid()}.tmp"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        with opener(path, "rb") as packed, open(temporary, "wb") as plain:
            shutil.copyfileobj(packed, plain, 2**20)
            sync_file(plain)
        os.replace(temporary, target)
    except (EOFError, lzma.LZMAError, zlib.error, OSError, ValueError) as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if getattr(error, "errno", None) is not None:
            raise
        raise RunError(f"source {path}: damaged or truncated ({error}); get the archive again") from None
    sync_folder(os.path.dirname(target))


def list_tar(path, number=0):
    """List the regular files of a plain tar, with links to them resolved.

    If the tar has no pictures itself, the tars inside it are listed too (ImageNet's training set has one per class).
    Their members are named INNER/NAME, where INNER is the name of the inner tar without its extension.

    Args:
        path: the tar.
        number: its number among the tars of a source.

    Returns:
        A `Listing` whose positions are (number, offset, size).

    Raises:
        RunError: the tar is damaged or truncated.
    """
    with open(path, "rb") as file:
        listing, hidden = Listing(), set()
        _walk_tar(file, path, number, 0, "", listing, hidden)
        if not listing.images:
            inner = [entry for entry in listing.files if entry[0].lower().endswith(".tar")]
            listing.files = [entry for entry in listing.files if not entry[0].lower().endswith(".tar")]
            for name, (_, start, size) in inner:
                window = _Window(file, start, size)
                _walk_tar(window, path, number, start, f"{name[:-4]}/", listing, hidden)
    return listing.settle()


class _Window:
    """A part of a file as a readable file object, to read a tar inside a tar without extracting it."""

    def __init__(self, file, start, size):
        self.file, self.start, self.size, self.position = file, start, size, 0

    def seek(self, offset, whence=os.SEEK_SET):
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = origin + offset
        return self.position

    def tell(self):
        return self.position

    def read(self, count=-1):
        left = max(0, self.size - self.position)
        count = left if count < 0 else min(count, left)
        self.file.seek(self.start + self.position)
        data = self.file.read(count)
        self.position += len(data)
        return data


def _walk_tar(file, path, number, base, prefix, listing, hidden):
    """Add the members of one tar, which begins at byte `base` of the file, to a listing."""
    links, last = [], -1
    first = len(listing.files)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # tarfile would keep every header: a gigabyte for a million images
                if info.size < 0 or tar.offset <= last:  # a damaged size would lead backwards, into an endless loop
                    raise tarfile.ReadError(f"no valid header at byte {base + info.offset}")
                last = tar.offset
                name = prefix + info.name
                if info.isdir():
                    listing.folders.append(clean_name(name) or ".")
                elif info.issym() or info.islnk():
                    links.append((name, info.linkname, info.issym()))
                elif not info.isreg() or info.sparse is not None:
                    listing.reject(name, "not a regular file of the tar" if info.sparse is None else "a sparse file")
                else:
                    listing.add(name, (number, base + info.offset_data, info.size), hidden)
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end, which would lose images
                raise tarfile.ReadError(f"no valid header at byte {base + tar.offset}")
    except TAR_FAULTS as error:
        raise RunError(f"source {path}: damaged or truncated ({one_line(error)}); get the archive again") from None
    resolve_links(listing, first, [(name, target, symbolic, prefix) for name, target, symbolic in links], hidden)


# The errors that tarfile raises for damaged headers. RecursionError comes from a long chain of extended headers.
TAR_FAULTS = (tarfile.TarError, EOFError, OverflowError, ValueError, RecursionError, KeyError, IndexError, struct.error)


def resolve_links(listing, first, links, hidden):
    """Add links to pictures to the listing, with the positions of their targets; reject links that lead nowhere.

    Args:
        listing: the `Listing`; its files from index `first` on are those of this archive.
        first: see listing.
        links: (name, target, symbolic, prefix) of each link. The target of a hard link is relative to the archive's
            root (`prefix`), that of a symbolic link to the link's folder.
        hidden: set of hidden folders, see `Listing.add`.
    """
    if not links:
        return
    places = dict(listing.files[first:])
    target_of = {}
    for name, target, symbolic, prefix in links:
        origin = name.rpartition("/")[0] if symbolic else prefix.rstrip("/")
        outside = symbolic and target.startswith("/")
        path = posixpath.normpath(posixpath.join(origin, target.replace("\\", "/").lstrip("/")))
        target_of[clean_name(name)] = None if outside else clean_name(path)
    for name, target, _, _ in links:
        end = clean_name(name)
        for _ in range(MAX_LINKS):
            if end is None or end in places:
                break
            end = target_of.get(end)
        if end in places:
            listing.add(name, places[end], hidden)
        else:
            listing.reject(name, f"a link to {target}, which is not a file in the archive")


def list_zip(path):
    """List the regular files of a zip, with links to them resolved. A position is an index into the list of members.

    Names that are UTF-8 without the flag for it, as macOS writes them, are read as UTF-8.

    Raises:
        UsageError: every picture in it is encrypted.
        RunError: the zip is damaged, or its version is not supported.
    """
    listing, hidden, links, encrypted = Listing(), set(), [], []
    try:
        with zipfile.ZipFile(path) as archive:
            for number, info in enumerate(archive.infolist()):
                name = _zip_name(info)
                kind = stat.S_IFMT(info.external_attr >> 16)
                if name.endswith(("/", "\\")):
                    listing.folders.append(clean_name(name) or ".")
                elif info.flag_bits & 1:
                    encrypted.append(name)
                elif kind == stat.S_IFLNK and has_image_ending(name):
                    links.append((name, _link_target(archive, info), True, ""))
                elif kind in (0, stat.S_IFREG):
                    listing.add(name, number, hidden)
                elif kind == stat.S_IFDIR:
                    listing.folders.append(clean_name(name) or ".")
                else:
                    listing.reject(name, "not a regular file")
    except NotImplementedError as error:  # zipfile raises this for versions of the format that it cannot read
        raise RunError(f"source {path}: cannot be read here ({error}); pack the images again") from None
    except (zipfile.BadZipFile, EOFError, ValueError, OverflowError, struct.error, IndexError, OSError) as error:
        raise RunError(f"source {path}: damaged or truncated ({one_line(error)}); get the archive again") from None
    resolve_links(listing, 0, links, hidden)
    before = len(listing.rejected)
    for name in encrypted:
        listing.reject(name, "is encrypted; unpack the zip with its password")
    if len(listing.rejected) > before and not listing.images:
        raise UsageError(
            f"source {path}: the zip is encrypted; unpack it with its password and give the unpacked folder"
        )
    return listing.settle()


def _zip_name(info):
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _link_target(archive, info):
    """The target of a link in a zip, or "" where it cannot be read."""
    try:
        return archive.read(info).decode("utf-8") if info.file_size < 4096 else ""
    except Exception:  # damage makes zipfile raise nearly any error; the link is then rejected
        return ""


class TarReader:
    """Reads members of tars by their position. Picklable: a process opens the files when it first reads them."""

    def __init__(self, paths):
        self.paths = [str(path) for path in paths]

    def __call__(self, item):
        number, offset, size = item.where
        if size > MAX_BYTES:
            raise BadImage(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
        file = _open_file(self.paths[number])
        file.seek(offset)
        data = file.read(size)
        if len(data) < size:
            raise BadImage("the archive ends in the middle of it")
        return data


class ZipReader:
    """Reads members of a zip by their index. Picklable: a process opens the file when it first reads from it."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self, item):
        archive = _open_zip(self.path)
        info = archive.infolist()[item.where]
        if info.file_size > MAX_BYTES:
            raise BadImage(f"{info.file_size:,} bytes, over the limit of {MAX_BYTES:,}")
        return archive.read(info)


@lru_cache(maxsize=16)
def _open_file(path):
    return open(path, "rb")


@lru_cache(maxsize=4)
def _open_zip(path):
    return zipfile.ZipFile(path)
