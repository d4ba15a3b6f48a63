"""Atomic writes of files, also on full disks and on file systems that lack some operations."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

# Errors of the disk or the file system, not of the program. A command reports them in one line.
DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO", "ESTALE", "ENODEV", "ENOTCONN", "EREMOTEIO")
    if hasattr(errno, name)
}
# A sync that fails with one of these has lost data. Every other error means that the file system has no such sync:
# SMB, CIFS, some FUSE and WSL mounts refuse to sync a folder, and a few of them a file.
LOST = {errno.ENOSPC, errno.EDQUOT, errno.EIO}


def is_disk_error(error):
    """True if an exception, or one of its causes, is the error of a full, lost or read-only disk."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_reason(error):
    """The cause that `is_disk_error` found: the system's message, and the file if it is known."""
    while not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        error = error.__cause__ or error.__context__
    return os.strerror(error.errno) + (f": {error.filename}" if error.filename else "")


def sync_file(file):
    """Make the data written to an open file durable, if its file system can."""
    file.flush()
    _sync(file.fileno())


def sync_folder(folder):
    """Make renames in a folder durable, if its file system can."""
    try:
        handle = os.open(folder or ".", os.O_RDONLY)
    except OSError:
        return
    try:
        _sync(handle)
    finally:
        os.close(handle)


def _sync(handle):
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in LOST:
            raise


def remove_leftovers(path):
    """Remove temporary files of `path` from killed processes. No other process may be writing `path` meanwhile."""
    pattern = _temporary(Path(path), "*").name
    for temporary in Path(path).parent.glob(pattern):
        temporary.unlink(missing_ok=True)


def _temporary(path, process):
    return path.with_name(f".{path.stem}.{process}.tmp{path.suffix}")


def write_atomically(path, data):
    """Write bytes to a file atomically, also with respect to a power cut."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
        sync_file(file)


@contextmanager
def replacing(path):
    """Context with the path (str) of a temporary file, which replaces `path` at the end.

    After an error the temporary file is removed, and `path` is unchanged. The temporary name has the same ending as
    `path`, because libraries choose a format by it.
    """
    path = Path(path)
    temporary = _temporary(path, os.getpid())
    try:
        yield str(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
