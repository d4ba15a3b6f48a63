"""A lock that allows one writer per folder. The system releases it when the process ends, also when it is killed."""

import json
import os
import socket
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from maskalign.errors import UsageError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

NAME = ".lock"
_held = set()  # descriptors of this process's locks


@contextmanager
def locked(folder, what, option="--out", patience=1.0):
    """Keep other writers out of a folder while the context lasts.

    The lock is flock's on FOLDER/.lock, which holds the name of the machine and the process. A file that a killed
    process left behind locks nothing. If the file system has no locks, a warning says so.

    Args:
        folder: created with its parents if it does not exist, and removed again if it is empty at the end.
        what: the command, for the message to another one.
        option: the setting that named the folder.
        patience: seconds to wait for a process that is about to end.

    Raises:
        UsageError: another process holds the lock, or the folder cannot be written to.
    """
    path = Path(folder, NAME)
    _make(path.parent, option)
    handle = _acquire(path, what, option, patience) if fcntl else None
    try:
        yield
    finally:
        if handle is not None:
            _held.discard(handle)
            # The file is removed while it is still locked. A waiting process then sees that its open file is not the
            # file at this path any more, see `_is_file`.
            path.unlink(missing_ok=True)
            os.close(handle)
        with suppress(OSError):
            path.parent.rmdir()  # only if it is empty


def _make(folder, option):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{option}: {folder} is not a folder; choose another one") from None


def _acquire(path, what, option, patience):
    deadline = time.monotonic() + patience
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the previous holder has just removed the empty folder
            _make(path.parent, option)
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            holder = _holder(handle)
            os.close(handle)
            if time.monotonic() > deadline:
                raise UsageError(
                    f"{option}: {path.parent} is in use by {holder}; wait until it ends or stop it, or choose another "
                    "folder"
                ) from None
            time.sleep(0.1)
            continue
        except OSError as error:
            print(
                f"maskalign: {path.parent}: this file system has no locks ({error.strerror}); do not let two commands "
                "write there at once",
                file=sys.stderr,
            )
        if _is_file(handle, path):
            break
        os.close(handle)  # another process has removed the file meanwhile
    _held.add(handle)
    note = {"what": what, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with suppress(OSError):  # on a full disk the lock works without the note
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(note).encode(), 0)
    return handle


def _is_file(handle, path):
    """True if an open file is still the one at `path`."""
    try:
        current = os.stat(path)
    except FileNotFoundError:
        return False
    mine = os.fstat(handle)
    return (mine.st_dev, mine.st_ino) == (current.st_dev, current.st_ino)


def _holder(handle):
    try:
        note = json.loads(os.pread(handle, 4096, 0))
        return f"{note['what']} (process {note['pid']} on {note['host']}, since {note['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _leave_to_parent():
    """Close the lock files in a forked child, which would otherwise keep its parent's locks."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
