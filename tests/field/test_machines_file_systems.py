# ruff: noqa: F401, F811 (fixtures are imported)
"""File systems that cannot sync a folder or a file (SMB, CIFS, some FUSE and WSL mounts), or have no locks."""

import errno
import fcntl
import os
import stat

import pytest

from maskalign.checkpoints.command import convert
from maskalign.checkpoints.layout import complete_checkpoints, find_damage
from maskalign.data.build import build, check, encode
from maskalign.runtime.files import sync_folder
from tests.on_disk import random_pictures, write_pictures
from tests.tiny_runs import command, data_set, run

own_sync, own_open = os.fsync, os.open


def is_folder(handle):
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def lacking(monkeypatch, what):
    """Let the operating system refuse what such file systems refuse."""

    def fsync(handle):
        handle = handle if isinstance(handle, int) else handle.fileno()
        if what == "files cannot be synced" or is_folder(handle):
            number = errno.ENOSYS if what == "files cannot be synced" else errno.EINVAL
            raise OSError(number, os.strerror(number))
        return own_sync(handle)

    def open_file(path, flags, *arguments, **keywords):
        if what == "folders cannot be opened" and os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return own_open(path, flags, *arguments, **keywords)

    def flock(handle, operation):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "open", open_file)
    if what == "there are no locks":
        monkeypatch.setattr(fcntl, "flock", flock)


KINDS = ["folders cannot be synced", "folders cannot be opened", "files cannot be synced", "there are no locks"]


@pytest.mark.parametrize("what", KINDS)
def test_a_run_saves_resumes_and_exports(run, tmp_path, monkeypatch, what):
    lacking(monkeypatch, what)
    run(training__max_steps=2)
    assert run(training__max_steps=4)["step"] == 4
    assert all(find_damage(path) is None for path in complete_checkpoints(tmp_path / "run"))
    convert(tmp_path / "run", tmp_path / "weights.safetensors", to="safetensors", weights="ema")
    assert (tmp_path / "weights.safetensors").stat().st_size > 1000


# Removing a folder opens it.
@pytest.mark.parametrize("what", [what for what in KINDS if what != "folders cannot be opened"])
def test_a_data_set_is_built_and_encoded(tmp_path, monkeypatch, what):
    lacking(monkeypatch, what)
    write_pictures(tmp_path / "pictures" / "ant", random_pictures(4))
    build(str(tmp_path / "pictures"), tmp_path / "data", size=16, quiet=True)
    encode(tmp_path / "data", teacher="timm:vit_tiny_patch16_224", weights="random", workers=1, quiet=True)
    assert not check(str(tmp_path / "data"), workers=1)


def test_a_sync_that_lost_data_is_still_an_error(tmp_path, monkeypatch):
    def fsync(handle):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
