"""Listing zip and tar archives, and reading single members by their place. Nothing is ever extracted to disk.

A tar is walked once; after that each member is (tar number, offset, size), read without tarfile.
"""

import bz2
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import zipfile
from functools import lru_cache

from maskalign.data.images import MAX_BYTES, BadImage
from maskalign.errors import RunError, UsageError
from maskalign.runtime.files import sync_file, sync_folder

COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}


def archive_kind(path):
    """ "zip", "tar", "compressed tar" or None, by the file's content and not by its name.

    Raises:
        UsageError: it cannot be read, or is the beginning of a zip.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
    except OSError as error:
        raise UsageError(f"source {path}: cannot be read ({error.strerror})") from None
    if start[:2] == b"PK" and zipfile.is_zipfile(path):
        return "zip"
    if start[:4] == b"PK\x03\x04":
        raise UsageError(f"source {path}: the zip archive is damaged or cut short")
    if any(start.startswith(magic) for magic in COMPRESSIONS):
        return "compressed tar"
    try:
        return "tar" if tarfile.is_tarfile(path) else None
    except (OSError, EOFError):
        return None


def decompress(path, target):
    """Undo the compression (not the archive) of a tar.gz, .bz2 or .xz into `target`, whole or not at all.

    Images are read in random order, which a compressed stream does not allow.
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
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, OSError, ValueError) as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if getattr(error, "errno", None) is not None:
            raise
        raise RunError(f"source {path}: damaged or cut short ({error}); get the archive again") from None
    sync_folder(os.path.dirname(target))


def list_tar(path, number=0, depth=1):
    """Yield (name, (number, offset, size)) of each regular file in a plain tar.

    A tar inside the tar, as ImageNet's training set has one for each class, is opened too: its members are
    called INNER/NAME, without the ending of the inner tar.
    """
    with open(path, "rb") as file:
        yield from _walk_tar(file, path, number, depth, base=0)


class _Window:
    """A part of a file that looks like a file of its own: a tar inside a tar, read in place."""

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


def _walk_tar(file, path, number, depth, base):
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # or tarfile keeps every header: a gigabyte for a million images
                if not info.isreg() or info.sparse is not None:
                    continue
                start = base + info.offset_data
                if depth and info.name.endswith(".tar"):
                    outer = file.file if isinstance(file, _Window) else file
                    inner = _walk_tar(_Window(outer, start, info.size), path, number, depth - 1, start)
                    for name, where in inner:
                        yield f"{info.name.removesuffix('.tar')}/{name}", where
                else:
                    yield info.name, (number, start, info.size)
            file.seek(tar.offset)
            if file.read(512).strip(b"\0"):  # tarfile takes a damaged header for the end: images would be lost
                raise tarfile.ReadError(f"no valid header at byte {base + tar.offset}")
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise RunError(f"source {path}: damaged or cut short ({error}); get the archive again") from None


def list_zip(path):
    """Yield (name, None) of each regular file in a zip; links and encrypted members are passed over."""
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                kind = stat.S_IFMT(info.external_attr >> 16)
                if not info.is_dir() and kind in (0, stat.S_IFREG) and not info.flag_bits & 1:
                    yield info.filename, None
    except NotImplementedError as error:  # zipfile's word for a version of the format that it does not read
        raise RunError(f"source {path}: cannot be read here ({error}); pack the images anew") from None
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise RunError(f"source {path}: damaged or cut short ({error}); get the archive again") from None


class TarReader:
    """Reads members of tars by their place; picklable, opens the files where it is used."""

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
            raise BadImage("the archive ends inside it")
        return data


class ZipReader:
    """Reads members of a zip by their names; picklable, opens the file where it is used."""

    def __init__(self, path):
        self.path = str(path)

    def __call__(self, item):
        archive = _open_zip(self.path)
        size = archive.getinfo(item.name).file_size
        if size > MAX_BYTES:
            raise BadImage(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
        return archive.read(item.name)


@lru_cache(maxsize=16)
def _open_file(path):
    return open(path, "rb")


@lru_cache(maxsize=4)
def _open_zip(path):
    return zipfile.ZipFile(path)
