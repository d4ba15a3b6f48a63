"""Checks that a command can write its output, before the work starts."""

import os
from pathlib import Path

from maskalign.errors import UsageError


def make_folder(path, option="--out"):
    """Create a folder to write to, with its parents, unless it exists.

    Args:
        path: the folder.
        option: the option that named it, for the message.

    Returns:
        Path.

    Raises:
        UsageError: the folder cannot be created or written to, or it is a data set, which must not hold other files.
    """
    folder = Path(path)
    if (folder / "manifest.json").exists():
        raise UsageError(f"{option}: {folder} is a data set; choose another folder")
    return _make(folder, option)


def _make(folder, option):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror
    else:
        if os.access(folder, os.W_OK):
            return folder
        reason = "permission denied"
    raise UsageError(f"{option}: {folder} cannot be written to ({reason}); choose another folder")


def check_file(path, option="--out"):
    """Create the folder of a file to write, and check that the file's path is not a folder.

    Args:
        path: the file.
        option: the option that named it, for the message.

    Returns:
        Path.

    Raises:
        UsageError: the file cannot be written.
    """
    file = Path(path)
    if file.is_dir():
        raise UsageError(f"{option}: {file} is a folder; give the name of a file")
    _make(file.parent, option)
    return file


def is_run(folder):
    """True if a folder is the folder of a training run."""
    folder = Path(folder)
    return (folder / "checkpoints").is_dir() or all((folder / name).exists() for name in ("config.yaml", "metrics.csv"))
