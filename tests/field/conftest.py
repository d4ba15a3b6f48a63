"""Writers of what people have on disk, and a reader of what became of it that is not ours."""

import csv
import io
import tarfile
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.on_disk import png, write_folder, write_tar, write_zip


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
