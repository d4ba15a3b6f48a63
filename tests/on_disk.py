"""Pictures, folders and archives on disk, as the tests of data sources and of evaluations need them."""

import io
import tarfile
import zipfile

import numpy as np
from PIL import Image


def png(color=(200, 30, 30), side=12):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, format="PNG")
    return buffer.getvalue()


def random_pictures(count=12, size=16, seed=0):
    """(count, size, size, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def write_pictures(folder, arrays):
    """A folder of PNG pictures; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(arrays):
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
    return folder


def write_folder(root, files):
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # the constructor would mend some names
            archive.writestr(info, data)
    return path
