"""Archives as programs and people make them: what they hold is built or listed, and never lost without a word."""

import io
import json
import os
import tarfile
import zipfile

import pytest

RED, GREEN, BLUE = (200, 30, 30), (30, 200, 30), (30, 30, 200)


def two_classes(on_disk, prefix=""):
    return {
        f"{prefix}cat/1.png": on_disk.png(RED),
        f"{prefix}cat/2.png": on_disk.png(GREEN),
        f"{prefix}dog/3.png": on_disk.png(BLUE),
    }


LABELS = {RED: 0, GREEN: 0, BLUE: 1}


@pytest.mark.parametrize("stray", ["classes.json", "cat/meta.json", "dataset_info.json", "cat.cls", "1.cls"])
def test_a_stray_json_makes_no_webdataset_of_class_folders(on_disk, build, tmp_path, stray):
    source = on_disk.tar("set.tar", two_classes(on_disk) | {stray: b'{"cat": 0}'})
    _, manifest, said, _ = build(source)
    assert manifest.class_names == ["cat", "dog"] and on_disk.labels(tmp_path / "out") == LABELS
    assert f".{stray.rpartition('.')[2]} 1" in said


def test_json_beside_every_picture_without_a_label_is_no_webdataset(on_disk, build, tmp_path):
    files = two_classes(on_disk)
    files |= {name.replace("png", "json"): b'{"url": "x"}' for name in files}
    assert build(on_disk.tar("set.tar", files))[1].class_names == ["cat", "dog"]
    assert on_disk.labels(tmp_path / "out") == LABELS


def test_json_beside_every_picture_with_a_label_is_one(on_disk, build, tmp_path):
    files = two_classes(on_disk)
    files |= {name.replace("png", "json"): json.dumps({"label": n % 2}).encode() for n, name in enumerate(list(files))}
    _, manifest, said, _ = build(on_disk.tar("set.tar", files))
    assert manifest.class_names == ["0", "1"] and "from the samples' labels" in said


@pytest.mark.parametrize("packed", [False, True])
def test_zip_with_backslashes(on_disk, build, tmp_path, packed):
    files = {name.replace("/", "\\"): data for name, data in two_classes(on_disk, "set/").items()}
    if packed:
        source = on_disk.zip("windows.zip", files | {"set\\": b"", "set\\cat\\": b""})
    else:  # what an unpacker that does not know them leaves on a disk with slashes
        source = on_disk.folder("windows", files)
    _, manifest, _, _ = build(source)
    assert manifest.class_names == ["cat", "dog"] and on_disk.labels(tmp_path / "out") == LABELS


def add_link(path, name, target, kind=tarfile.LNKTYPE):
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)


def test_links_in_a_tar_are_the_pictures_they_lead_to(on_disk, build, tmp_path):
    files = two_classes(on_disk, "./set/") | {"./set/store/abc": on_disk.png((9, 90, 9))}
    path = on_disk.tar("links.tar", files)
    add_link(path, "./set/dog/4.png", "set/cat/1.png")
    add_link(path, "set/dog/5.png", "./set/dog/4.png")
    add_link(path, "set/dog/6.png", "../cat/2.png", tarfile.SYMTYPE)
    add_link(path, "set/dog/7.png", "../store/abc", tarfile.SYMTYPE)
    _, manifest, _, _ = build(path)
    assert manifest.num_samples == 7 and manifest.class_names == ["cat", "dog"]
    assert on_disk.labels(tmp_path / "out")[9, 90, 9] == 1 and on_disk.bad(tmp_path / "out") == {}
    with tarfile.open(path) as tar:  # the same as the folder that it unpacks to
        tar.extractall(tmp_path / "unpacked", filter="data")
    assert build(tmp_path / "unpacked", out="out2")[1].num_samples == 7


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
@pytest.mark.parametrize("target", ["missing.png", "/etc/passwd", "../../../x.png", "5.png", "cat/5.png", ""])
def test_links_that_lead_nowhere_are_listed(on_disk, build, tmp_path, kind, target):
    path = on_disk.tar("links.tar", two_classes(on_disk))
    add_link(path, "cat/5.png", target, kind)
    status, manifest, _, _ = build(path, "--max_bad_fraction", 0.5)
    assert status == 0 and manifest.num_samples == 3
    assert list(on_disk.bad(tmp_path / "out")) == ["cat/5.png"]


def test_links_in_a_zip(on_disk, build, tmp_path):
    source = on_disk.zip("links.zip", two_classes(on_disk))
    with zipfile.ZipFile(source, "a") as archive:
        for name, target in (("dog/4.png", "../cat/1.png"), ("dog/5.png", "../../1.png")):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, target)
    assert build(source, "--max_bad_fraction", 0.5)[1].num_samples == 4
    assert list(on_disk.bad(tmp_path / "out")) == ["dog/5.png"]


@pytest.mark.parametrize("how", ["folder", "pattern", "nested", "tar"])
def test_class_tars_as_imagenet_is_unpacked_once(on_disk, build, tmp_path, how):
    prefix = "train/" if how == "nested" else ""
    (tmp_path / "set" / prefix).mkdir(parents=True)
    for label, colors in (("n02", [BLUE]), ("n01", [RED, GREEN])):
        names = {f"{label}_{number}.PNG": on_disk.png(color) for number, color in enumerate(colors)}
        on_disk.tar(f"set/{prefix}{label}.tar", names)
    source = tmp_path / "set"
    if how == "tar":
        source = on_disk.tar("all.tar", {f"{n}.tar": (source / f"{n}.tar").read_bytes() for n in ("n01", "n02")})
    _, manifest, _, _ = build(f"{source}/*.tar" if how == "pattern" else source)
    assert manifest.class_names == ["n01", "n02"] and on_disk.labels(tmp_path / "out") == LABELS


def test_one_class_tar_is_one_class(on_disk, build):
    source = on_disk.tar("n01440764.tar", {f"n01440764_{n}.png": on_disk.png() for n in range(2)})
    assert build(source)[1].class_names == ["n01440764"]


def test_a_tar_beside_pictures_is_counted(on_disk, build):
    inner = on_disk.tar("inner.tar", two_classes(on_disk)).read_bytes()
    for kind in ("folder", "tar", "zip"):
        source = getattr(on_disk, kind)(f"set.{kind}", two_classes(on_disk) | {"cat/more.tar": inner})
        _, manifest, said, _ = build(source, out=kind)
        assert manifest.num_samples == 3 and ".tar 1" in said


def test_compressed_class_tars_are_named_and_not_half_read(on_disk, build, tmp_path):
    on_disk.folder("set", {"n01.tar.gz": b"x", "n02.tar.gz": b"x"})
    status, _, _, error = build(tmp_path / "set")
    assert status == 2 and ".gz 2" in error and "unpack them" in error


@pytest.mark.parametrize("ending", ["cls", "json"])
def test_keys_with_dots(on_disk, build, tmp_path, ending):
    files = {}
    for day, (color, label) in enumerate([(RED, 0), (GREEN, 1), (BLUE, 1)]):
        files[f"2021.05.{day:02d}.png"] = on_disk.png(color)
        files[f"2021.05.{day:02d}.{ending}"] = str(label).encode()
    _, manifest, _, _ = build(on_disk.tar("days.tar", files))
    assert manifest.num_samples == 3 and on_disk.labels(tmp_path / "out") == {RED: 0, GREEN: 1, BLUE: 1}


def test_pictures_with_dots_in_class_folders(on_disk, build):
    files = {f"cat/2021.05.{day:02d}.png": on_disk.png() for day in range(3)}
    assert build(on_disk.tar("days.tar", files))[1].num_samples == 3


def test_further_pictures_of_a_sample_are_counted(on_disk, build, tmp_path):
    files = {}
    for n, color in enumerate([RED, GREEN]):
        files |= {f"{n}.png": on_disk.png(color), f"{n}.mask.png": on_disk.png(), f"{n}.cls": str(n).encode()}
    _, manifest, said, _ = build(on_disk.tar("masks.tar", files))
    assert manifest.num_samples == 2 and ".mask.png 2" in said
    assert on_disk.labels(tmp_path / "out") == {RED: 0, GREEN: 1}


def test_samples_whose_picture_or_label_is_in_doubt_are_listed(on_disk, build, tmp_path):
    files = {f"{n}.{e}": on_disk.png() if e == "png" else b"0" for n in range(8) for e in ("png", "cls")}
    files |= {"a.left.png": on_disk.png(), "a.right.png": on_disk.png(), "a.cls": b"0"}
    files |= {"b.png": on_disk.png(), "b.jpg": on_disk.png(), "b.cls": b"0", "c.png": on_disk.png()}
    files |= {"d.cls": b"0", "d.heic": b"x"}
    path = on_disk.tar("odd.tar", files)
    with tarfile.open(path, "a") as tar:
        for name, data in (("0.png", on_disk.png(BLUE)), ("1.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    _, manifest, said, _ = build(path, "--max_bad_fraction", 0.9, "--holes", "keep")
    bad = on_disk.bad(tmp_path / "out")
    assert {name.rpartition("/")[2] for name in bad} == {
        "a.left.png", "a.right.png", "b.png", "b.jpg", "c", "d", "0.png"
    }  # fmt: skip
    assert "several images" in bad["odd.tar/a.left.png"] and "several images" in bad["odd.tar/b.jpg"]
    assert manifest.num_samples == 8 and ".heic 1" in said


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_of_members_with_one_name_the_last_counts(on_disk, build, tmp_path, kind):
    source = getattr(on_disk, kind)(f"set.{kind}", two_classes(on_disk))
    if kind == "tar":
        on_disk.tar("set.tar", {"./cat//1.png": on_disk.png((9, 9, 90))}, "a")
    else:
        with zipfile.ZipFile(source, "a") as archive:
            archive.writestr("./cat/1.png", on_disk.png((9, 9, 90)))
    assert build(source, "--max_bad_fraction", 0.5)[1].num_samples == 3
    assert on_disk.labels(tmp_path / "out") == {(9, 9, 90): 0, GREEN: 0, BLUE: 1}
    assert on_disk.bad(tmp_path / "out") == {"cat/1.png": "replaced by a later file of the same name"}


def encrypt(path, names):
    """Set the flag of encryption of some members, in both of a zip's headers."""
    data = bytearray(path.read_bytes())
    for name in names:
        for magic, flag, start in ((b"PK\3\4", 6, 30), (b"PK\1\2", 8, 46)):
            place = data.find(magic)
            while place >= 0:
                if data[place + start :].startswith(name.encode()):
                    data[place + flag] |= 1
                place = data.find(magic, place + 1)
    path.write_bytes(data)
    return path


def test_encrypted_zips_are_called_encrypted(on_disk, build, tmp_path):
    files = two_classes(on_disk)
    status, _, _, error = build(encrypt(on_disk.zip("all.zip", files), files))
    assert status == 2 and "the zip is encrypted; unpack it with its password" in error
    assert not (tmp_path / "out").exists()
    assert build(encrypt(on_disk.zip("some.zip", files), ["cat/2.png"]), "--max_bad_fraction", 0.5)[0] == 0
    assert on_disk.bad(tmp_path / "out") == {"cat/2.png": "is encrypted; unpack the zip with its password"}


@pytest.mark.parametrize("kind", ["folder", "tar", "class tar", "source folder"])  # names in a zip are always text
def test_a_class_whose_name_is_not_utf8_is_named_before_the_work(on_disk, build, tmp_path, kind):
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    files = {f"{latin}/1.png": on_disk.png(RED), "tea/2.png": on_disk.png(GREEN)}
    if kind == "class tar":
        (tmp_path / "set").mkdir()
        on_disk.tar(f"set/{latin}.tar", {"1.png": on_disk.png()})
        source = tmp_path / "set"
        on_disk.tar("set/tea.tar", {"1.png": on_disk.png()})
    elif kind == "source folder":
        source = on_disk.folder(latin, {"cat/1.png": on_disk.png()})
        _, manifest, _, _ = build(source)
        assert manifest.source == "folder caf\\udce9" and manifest.class_names == ["cat"]
        return
    elif kind == "tar":
        path = on_disk.tar("set.tar", {name.replace(latin, "cafX"): data for name, data in files.items()})
        data = path.read_bytes().replace(b"cafX", b"caf\xe9")
        data = bytearray(data)
        checksum = 256 + sum(data[:148]) + sum(data[156:512])
        data[148:156] = b"%06o\0 " % checksum
        path.write_bytes(data)
        source = path
    else:
        source = on_disk.folder("set", files)
    status, _, _, error = build(source)
    assert status == 2 and r"the class name 'caf\udce9' is not UTF-8" in error and "convmv" in error
    assert not (tmp_path / "out").exists()


def test_pictures_whose_names_are_not_utf8_are_built_or_listed(on_disk, build, tmp_path):
    latin = b"caf\xe9.png".decode("utf-8", "surrogateescape")
    source = on_disk.folder("set", {f"cat/{latin}": on_disk.png(RED), f"dog/{latin}": b"no picture"})
    status, manifest, said, _ = build(source, "--max_bad_fraction", 0.5)
    assert status == 0 and manifest.num_samples == 1
    assert list(on_disk.bad(tmp_path / "out")) == [r"dog/caf\udce9.png"] and "skipped 1 bad" in said


def test_macos_zips_have_utf8_names_without_saying_so(on_disk, build):
    name = "caf\u00e9"
    plain = on_disk.zip("mac.zip", {"cafXY/1.png": on_disk.png(), "tea/1.png": on_disk.png()})
    plain.write_bytes(plain.read_bytes().replace(b"cafXY", name.encode()))
    assert build(plain)[1].class_names == [name, "tea"]


def test_a_label_in_a_json_that_is_no_text(on_disk, build):
    files = {"1.png": on_disk.png(), "1.json": b'{"label": "\\ud800"}'}
    status, _, _, error = build(on_disk.tar("a.tar", files))
    assert status == 2 and "is not UTF-8" in error


def test_folders_that_cannot_be_read_are_listed(on_disk, build, tmp_path, monkeypatch):
    source = on_disk.folder("set", two_classes(on_disk))
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr("maskalign.data.build.listing.os.scandir", refuse)
    build(source, "--max_bad_fraction", 0.5)
    assert on_disk.bad(tmp_path / "out") == {"dog": "the folder cannot be read (Permission denied)"}
