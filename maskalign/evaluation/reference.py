"""A cache of the features of a data set's images.

The name of a file contains a fingerprint of everything that the features depend on: the checksums of all shards, the
choice of images, and the network's weights, preprocessing and pooling. Another data set under the same path therefore
has another file.
"""

import hashlib
import json
import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maskalign.errors import UsageError

log = logging.getLogger(__name__)

VERSION = 1
KEPT = 32  # number of files in the cache; the least recently used ones are removed


class Reference(NamedTuple):
    """features: (n, D) float32 and labels: (n,) int64 of real images; cached: True if they came from the cache."""

    features: np.ndarray
    labels: np.ndarray
    cached: bool


def cache_folder():
    """Path of the cache: below MASKALIGN_CACHE, or below the user's cache folder (XDG_CACHE_HOME, ~/.cache)."""
    own = os.environ.get("MASKALIGN_CACHE")
    if own:
        return Path(own).expanduser() / "references"
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "maskalign")
    return root / "references"


def data_fingerprint(manifest):
    """32 hex digits that change with any byte of any shard of a data set, by the checksums in its manifest."""
    shards = [[shard.name, shard.num_samples, shard.bytes, shard.sha256] for shard in manifest.shards]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()[:32]


def reference_name(pictures, features):
    """File name of the reference of a `PictureDataSet` in the features of a network."""
    manifest = pictures.manifest
    contents = {
        "version": VERSION,
        "data": data_fingerprint(manifest),
        "resolution": manifest.resolution,
        "order": pictures.SEED,
        "count": pictures.count,
        "features": features.fingerprint(),
    }
    if pictures.classes is not None:
        contents["classes"] = pictures.classes
    digest = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:24]
    plain = "".join(letter if letter.isalnum() else "-" for letter in features.name)
    return f"{plain}-{pictures.count}-{digest}.npz"


def load_reference(pictures, features, *, batch_size=64, on_images=None):
    """The features of a data set's images, from the cache if possible.

    Args:
        pictures: `PictureDataSet`.
        features: a network with `name`, `dim`, `fingerprint()`, called with (B, 3, H, W) uint8.
        batch_size: images per batch.
        on_images: called with the number of images of every finished batch.

    Returns:
        Reference.

    Raises:
        UsageError: the data set has no images of the requested classes.
    """
    return load_references(pictures, [features], batch_size=batch_size, on_images=on_images)[0]


def load_references(pictures, kinds, compute=None, *, batch_size=64, on_images=None):
    """Several kinds of features of a data set's images. If one is not cached, all are computed in one pass.

    Args:
        pictures, batch_size, on_images: as for `load_reference`.
        kinds: networks as for `load_reference`.
        compute: (B, 3, H, W) uint8 -> a tensor (B, dim) for every kind; by default each network in turn.

    Returns:
        list of `Reference`, one per kind.

    Raises:
        UsageError: the data set has no images of the requested classes.
    """
    paths = [cache_folder() / reference_name(pictures, kind) for kind in kinds]
    found = [_read(path, kind.dim) for path, kind in zip(paths, kinds, strict=True)]
    if None not in found:
        return found
    compute = compute or (lambda batch: [kind(batch) for kind in kinds])
    parts = []
    for batch in pictures.batches(batch_size):
        parts.append([features.numpy() for features in compute(batch)])
        if on_images:
            on_images(len(batch))
    if not parts:
        raise UsageError(f"{pictures.path}: holds no pictures of these classes; name other --classes")
    labels = pictures.labels.numpy()
    made = [Reference(np.concatenate(column), labels, False) for column in zip(*parts, strict=True)]
    for path, old, new in zip(paths, found, made, strict=True):
        if old is None:
            _write(path, new)
    return made


def _read(path, dim):
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            features, labels = file["features"], file["labels"]
    except Exception as error:  # zipfile, zlib and numpy each raise their own types of errors for a damaged file
        log.warning("%s is damaged (%s): computed again", path, type(error).__name__)
        return None
    whole = features.ndim == 2 and features.shape[1] == dim and len(features) == len(labels)
    if not whole or not np.isfinite(features).all():
        log.warning("%s is damaged: computed again", path)
        return None
    os.utime(path)  # the cache removes the least recently used files
    return Reference(features, labels, True)


def _write(path, reference):
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(temporary, features=reference.features, labels=reference.labels)
        os.replace(temporary, path)
        for old in sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s cannot be written (%s): the reference is not kept", path, error.strerror)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
