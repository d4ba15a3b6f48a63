"""Sources that are mutated at random: names, archives, headers. No traceback, and every image is built or listed."""

import csv
import io
import json
import os
import random
import shutil
import tarfile
import zipfile

import pytest
from PIL import Image

from maskalign.data.build import build
from maskalign.data.build.images import ENDINGS
from maskalign.data.build.sources import open_source
from maskalign.data.format.manifest import Manifest
from maskalign.errors import RunError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore:Duplicate name")

PARTS = [
    "cat", "dog", "Cat", "1", "2", "10", "007", "train", "test", "images", "00000", "img00000001", "2020", "a b", " ",
    "caf\u00e9", "cafe\u0301", "\u732b", "x" * 120, "a.b", "2021.05.01", ".hidden", "__MACOSX", "._x", "__index__",
    "con", "a\nb", "\t", "\u202e", "name:2", "a,b", "-1", "\U0001f408", "%s", "*", "?", "[a]", "{0..3}", "$HOME",
    "~", "-",
]  # fmt: skip
ODD_NAMES = [
    "../up.png", "a/../../up.png", "/abs/cat/1.png", "C:\\pics\\cat\\1.png", "cat\\1.png", "./cat//1.png", "cat/", "",
    ".png", "cat/.png", "png", "cat/1.PNG", "cat/1.png ", "cat/1.jpeg.png", "cat/1.", "//", "cat/./1.png", "\\", "..",
    "cat/1.png/2.png", "classes.json", "dataset.json", "cat/dataset.json", "0.cls", "0.json", "a/0.cls", "inner.tar",
]  # fmt: skip
OTHER_ENDINGS = ["heic", "jfif", "txt", "json", "cls", "tar", "zip", "npy", "PNG", "JPeG"]


def picture(draw):
    kind = draw.choice(["PNG", "PNG", "JPEG", "WEBP", "GIF", "TIFF"])
    buffer = io.BytesIO()
    mode = draw.choice(["RGB", "L", "RGBA", "P"]) if kind == "PNG" else "RGB"
    Image.new("RGB", (draw.randint(1, 9), draw.randint(1, 9)), tuple(draw.randbytes(3))).convert(mode).save(
        buffer, kind
    )
    data = bytearray(buffer.getvalue())
    if draw.random() < 0.2:
        for _ in range(draw.randint(1, 5)):
            data[draw.randrange(len(data))] = draw.randrange(256)
    return bytes(data[: draw.randrange(len(data))] if draw.random() < 0.05 else data)


def some_label(draw):
    return draw.choice([0, 1, 1, 2, 3, 7, "cat", "dog", -1, None, 1.0, [0, 1], True, "\ud800", "", {"a": 1}, 10**12])


def some_json(draw, names):
    label = some_label(draw)
    table = {"labels": [[name, draw.choice([label, 0, 1])] for name in names if draw.random() < 0.9]}
    plain = {"labels": [[name, number % 2] for number, name in enumerate(names)]}
    data = draw.choice([plain, plain, table, {"labels": None}, {}, [], label, {"label": label}, {"labels": {"a": 1}}])
    text = json.dumps(data).encode()
    return text[: draw.randrange(len(text) + 1)] if draw.random() < 0.1 else text


def some_files(draw):
    """[(name, data)] of a plausible source with a few strange things in it; names may repeat."""
    layout = draw.choice(["classes", "flat", "edm", "samples", "nested", "odd"])
    files = []
    for number in range(draw.randint(1, 12)):
        name = {
            "classes": f"{draw.choice(PARTS[:8])}/{number}.png",
            "flat": f"{number}.jpg",
            "edm": f"0000{number // 4}/img{number:08d}.png",
            "samples": f"{number:04d}.png",
            "nested": "/".join(draw.choice(PARTS) for _ in range(draw.randint(1, 4))) + f"/{number}.webp",
            "odd": "/".join(draw.choice(PARTS) for _ in range(draw.randint(1, 3))) + f".{draw.choice(ENDINGS)}",
        }[layout]
        files.append((name, picture(draw)))
        if layout == "samples" and draw.random() < 0.9:
            ending = draw.choice(["cls", "cls", "json"])
            label = str(draw.choice([0, 1, 1, some_label(draw)])).encode("utf-8", "replace")
            files.append((f"{number:04d}.{ending}", label if ending == "cls" else some_json(draw, [])))
    if layout == "edm" and draw.random() < 0.8:
        files.append(("dataset.json", some_json(draw, [name for name, _ in files])))
    for _ in range(draw.randint(0, 3)):
        name = draw.choice(ODD_NAMES)
        if draw.random() < 0.5:
            name = f"{draw.choice(PARTS)}/{draw.choice(PARTS)}.{draw.choice(OTHER_ENDINGS)}"
        files.append((name, picture(draw) if draw.random() < 0.7 else some_json(draw, [])))
    if draw.random() < 0.2 and files:
        files.append((draw.choice(files)[0], picture(draw)))
    return files


def write_folder(root, files, draw):
    root.mkdir()
    for name, data in files:
        path = os.path.join(root, os.fsencode(name.replace("..", "up").lstrip("/")).decode("utf-8", "surrogateescape"))
        if draw.random() < 0.03:  # a folder that is not UTF-8
            path = os.path.join(root, "caf\udce9", os.path.basename(path) or "x.png")
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            kind = draw.random()
            if os.path.lexists(path):  # writing into a pipe would wait for ever
                continue
            if kind < 0.04:
                os.symlink(draw.choice([root, "nowhere", path]), path)
            elif kind < 0.05:
                os.mkfifo(path)
            else:
                with open(path, "wb") as file:
                    file.write(data)
        except (OSError, ValueError):  # names that a disk does not take, or that are a folder by now
            continue
    return root


def write_zip(path, files, draw):
    with zipfile.ZipFile(path, "w", draw.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for name, data in files:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.compress_type = archive.compression
            if draw.random() < 0.05:
                info.external_attr = draw.choice([0o120777, 0o010666, 0o100644, 0o040755]) << 16
                data = draw.choice([data, b"../cat/1.png", b"0.png", b""])
            archive.writestr(info, data)
    return path


def write_tar(path, files, draw):
    formats = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
    with tarfile.open(path, "w", format=draw.choice(formats)) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            if draw.random() < 0.08:
                info.type = draw.choice([tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"Z"])
                info.linkname = draw.choice([name, files[0][0], "../x.png", "/etc/passwd"])
            data = data if info.type in (tarfile.REGTYPE, b"Z") else b""
            info.size = len(data)
            try:
                tar.addfile(info, io.BytesIO(data))
            except ValueError:  # too long for ustar
                continue
    return path


def damage(path, draw):
    """Change bytes of an archive, most often in its headers, or cut or repeat a part of it."""
    data = bytearray(path.read_bytes())
    how = draw.random()
    if how < 0.6 and data:
        starts = [place for place in range(0, len(data), 512)]
        for magic in (b"PK\1\2", b"PK\3\4", b"PK\5\6"):
            place = data.find(magic)
            while place >= 0:
                starts.append(place)
                place = data.find(magic, place + 1)
        for _ in range(draw.randint(1, 6)):
            place = draw.choice(starts) + draw.randrange(160)
            if place < len(data):
                data[place] = draw.choice([0, 255, 128, draw.randrange(256), data[place] ^ 1])
    elif how < 0.8:
        del data[draw.randrange(len(data) + 1) :]
    elif data:
        start = draw.randrange(len(data))
        data[start:start] = data[: draw.randrange(1500)]
    path.write_bytes(data)


def is_picture(name):
    """Whether a visible name ends as a picture's, told without the code under test."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if not parts or any(part.startswith(".") and part != ".." or part == "__MACOSX" for part in parts):
        return False
    return os.path.splitext(parts[-1])[1].lower().lstrip(".") in ENDINGS


def count_pictures(source, kind):
    """Visible names of pictures in a source, by the standard library alone; None where it cannot tell."""
    try:
        if kind == "folder":
            seen = set()
            for folder, folders, names in os.walk(source):
                folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
                relative = os.path.relpath(folder, source)
                seen |= {os.path.join(relative, name) for name in names if is_picture(name)}
                seen -= {name for name in seen if os.path.isdir(os.path.join(source, name))}
            return len(seen)
        if kind == "zip":
            with zipfile.ZipFile(source) as archive:
                infos = [info for info in archive.infolist() if not info.filename.endswith(("/", "\\"))]
            return sum(is_picture(i.filename) for i in infos if i.external_attr >> 16 & 0o170000 != 0o040000)
        with tarfile.open(source) as tar:
            return sum(is_picture(info.name) for info in tar if not info.isdir())
    except Exception:  # damaged: the build must say so, or have found more than this
        return None


def one_mutation(folder, seed):
    """Build one mutated source; returns "built", "refused" or "failed", and raises where a rule is broken."""
    draw = random.Random(seed)
    files = some_files(draw)
    kind = draw.choice(["folder", "zip", "tar"])
    source = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind](folder / "source", files, draw)
    if kind != "folder" and draw.random() < 0.5:
        damage(source, draw)
    choices = {
        "class_folders": draw.choice([None, None, None, "top", "leaf", "path", "none"]),
        "holes": draw.choice([None, "keep", "close"]),
        "class_names": draw.choice([None, None, None, ["a", "b"], ["a", "a"]]),
    }
    options = {"size": 4, "workers": 0, "quiet": True, "max_bad_fraction": 1.0, **choices}
    there, out = count_pictures(source, kind), folder / "out"
    try:
        manifest = build(source, out, **options)
    except (UsageError, RunError) as error:
        assert "\n" not in str(error) and str(error).strip(), error
        str(error).encode("utf-8", "backslashreplace")
        assert not (out / "manifest.json").exists()
        return "refused" if isinstance(error, UsageError) else "failed"
    assert Manifest.load(out).num_samples == manifest.num_samples > 0
    listed = 0
    if (out / "bad.csv").exists():
        with open(out / "bad.csv", newline="", encoding="utf-8") as file:
            listed = len(list(csv.reader(file))) - 1
    found = open_source(source, size=4, **choices)
    further = sum(count for ending, count in found.passed.items() if ending.rpartition(".")[2] in ENDINGS)
    if there is not None:
        assert manifest.num_samples + listed + further >= there, (manifest.num_samples, listed, further, there)
    return "built"


def mutate(tmp_path, seeds):
    outcomes = []
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            outcomes.append(one_mutation(folder, seed))
        except Exception as error:
            raise AssertionError(f"mutation {seed}: {type(error).__name__}: {error}") from error
        shutil.rmtree(folder)
    return outcomes


def test_fifty_mutations(tmp_path, seed):
    outcomes = mutate(tmp_path, range(seed, seed + 50))
    assert outcomes.count("built") >= 5 and outcomes.count("refused") >= 5


@pytest.mark.slow
def test_five_hundred_mutations(tmp_path, seed):
    outcomes = mutate(tmp_path, range(seed, seed + 500))
    assert outcomes.count("built") >= 80 and outcomes.count("refused") >= 80 and outcomes.count("failed") >= 20
