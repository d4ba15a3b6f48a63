"""Writers of what people have on disk, and a reader of what became of it that is not ours."""

import csv
import io
import tarfile
import zipfile
from types import SimpleNamespace

import pytest
from PIL import Image


def png(color=(200, 30, 30), side=12):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), color).save(buffer, format="PNG")
    return buffer.getvalue()


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
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            info.filename = name  # the constructor would mend some names
            archive.writestr(info, data)
    return path


def read_back(folder):
    """{(red, green, blue) of the middle: label} and the number of samples, by tarfile and Pillow alone."""
    labels, number = {}, 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar if not info.name.startswith("__")}
        for name, data in members.items():
            if name.endswith(".png"):
                image = Image.open(io.BytesIO(data))
                color = image.getpixel((image.width // 2, image.height // 2))
                labels[color] = int(members[name.removesuffix("png") + "cls"])
                number += 1
    return labels, number


def bad_of(folder):
    """{image: reason} of bad.csv, {} where there is none."""
    path = folder / "bad.csv"
    if not path.exists():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        return dict(list(csv.reader(file))[1:])


@pytest.fixture
def on_disk(tmp_path):
    """Writers png(color), folder/zip/tar(name, {path: bytes}), and readers labels(out), count(out), bad(out)."""
    return SimpleNamespace(
        png=png,
        folder=lambda name, files: write_folder(tmp_path / name, files),
        zip=lambda name, files: write_zip(tmp_path / name, files),
        tar=lambda name, files, mode="w": write_tar(tmp_path / name, files, mode),
        labels=lambda out: read_back(out)[0],
        count=lambda out: read_back(out)[1],
        bad=bad_of,
    )


@pytest.fixture
def command(capfd):
    """command(*words) -> (exit status, stdout, list of the lines of stderr)."""
    from maskalign.cli import main

    def run(*words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return end.value.code, out, [line for line in err.splitlines() if line.startswith("maskalign")]

    return run


@pytest.fixture
def build(tmp_path, command):
    """build(source, *options, out="out") -> (exit status, manifest or None, stdout, the error's line or "")."""
    from maskalign.data.format.manifest import Manifest

    def run(source, *options, out="out"):
        words = ["data", "build", source, "--out", tmp_path / out, "--size", 8, "--workers", 0, *options]
        status, said, err = command(*words)
        assert len(err) == (status != 0), err
        made = (tmp_path / out / "manifest.json").exists()
        return status, Manifest.load(tmp_path / out) if made else None, said, err[0] if err else ""

    return run
