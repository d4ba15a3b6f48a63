"""Write samples to an .npz in ADM's format while they are drawn, in any number of processes; this can be resumed.

Drawn images are written to a memory-mapped .npy. A second file has one byte per image, which is 1 if the image is done.
The archive is written at the end. `NAME.json` keeps the settings, and resuming with other settings is an error.
"""

import json
import os
import zipfile
from pathlib import Path

import numpy as np

from maskalign.errors import RunError, UsageError


def _check_settings(record, settings):
    if not record.exists():
        return
    try:
        before = json.loads(record.read_text())
    except ValueError:
        raise UsageError(f"{record} is not readable; delete it and its set, or choose another --out") from None
    now = json.loads(json.dumps(settings))
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    differing = [f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in keys]
    if differing:
        raise UsageError(
            f"{record.with_suffix('.npz')} was begun with other settings ({'; '.join(differing)}); delete it or choose "
            "another --out"
        )


def _prepare(images, done, count, shape):
    """Create the two working files and allocate their space on disk, unless they exist."""
    if images.exists() and done.exists() and done.stat().st_size == count:
        return
    done.unlink(missing_ok=True)
    array = np.lib.format.open_memmap(images, mode="w+", dtype=np.uint8, shape=(count, *shape))
    size = array.offset + array.nbytes
    del array
    # With this, a full disk is an error now, and not a signal during a write to mapped memory.
    with open(images, "r+b") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
    done.write_bytes(bytes(count))


def write_npz(path, count, shape, draw, *, settings, batch_size, rank=0, world_size=1, barrier=None, on_done=None):
    """Draw `count` images into `path`, whose array `arr_0` is (count, H, W, 3) uint8.

    Args:
        path: the .npz to write.
        shape: (H, W, 3) of an image.
        draw: indices (list of int) -> (n, H, W, 3) uint8 array or tensor; an image may depend only on its index.
            The batches do not depend on the number of ranks, so that equal batch sizes give identical images.
        settings: dict of the settings that the images depend on; it must be serializable as JSON.
        batch_size: images per call of `draw`.
        rank, world_size: of this process; the missing batches are distributed round robin.
        barrier: function that waits for all processes; required with more than one.
        on_done: called with the number of images that this process has just finished, and first with its share of the
            images of an earlier run.

    Returns:
        The path. A complete set is not changed.

    Raises:
        UsageError: the set was begun with other settings.
        RunError: there is no space left on the disk.
    """
    path = Path(path)
    record, images, done = (path.with_suffix(ending) for ending in (".json", ".partial.npy", ".partial.done"))
    _check_settings(record, settings)
    meet = barrier or (lambda: None)
    try:
        # Every process checks this before rank 0 writes, so that all agree on whether the set is complete.
        complete = path.exists()
        meet()
        if complete:
            if on_done:
                on_done(count / world_size)
            return path
        if rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not record.exists():
                record.write_text(json.dumps(settings, indent=1) + "\n")
            _prepare(images, done, count, shape)
        meet()
        missing = _missing(done, count, batch_size)
        meet()  # all processes must read the missing batches before one of them finishes a batch
        if on_done:
            on_done((count - sum(map(len, missing))) / world_size)
        _draw_missing(images, done, draw, missing[rank::world_size], on_done)
        meet()
        if rank == 0:
            _pack(images, path)
            done.unlink()
            images.unlink()
        meet()
    except OSError as error:
        raise RunError(f"{path}: {error.strerror or error}; make room or choose another --out") from None
    return path


def _missing(done, count, batch_size):
    """The batches (ranges of indices) with at least one image that is not done."""
    flags = np.fromfile(done, dtype=np.uint8)
    batches = [range(begin, min(begin + batch_size, count)) for begin in range(0, count, batch_size)]
    return [batch for batch in batches if not flags[batch.start : batch.stop].all()]


def _draw_missing(images, done, draw, batches, on_done):
    array = np.load(images, mmap_mode="r+")
    flags = np.memmap(done, dtype=np.uint8, mode="r+")
    for batch in batches:
        rows = slice(batch.start, batch.stop)
        array[rows] = np.asarray(draw(list(batch)))
        array.flush()  # the images must be on disk before they count as done
        flags[rows] = 1
        flags.flush()
        if on_done:
            on_done(len(batch))


def _pack(images, path):
    """Write the .npy into an uncompressed archive, and rename it to `path` when it is complete."""
    temporary = path.with_suffix(".partial.npz")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        archive.write(images, "arr_0.npy")
    os.replace(temporary, path)
