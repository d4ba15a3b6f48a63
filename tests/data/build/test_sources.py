"""Sources: what is listed, how it is labeled, and what is refused. Read back with the public webdataset reader."""

import csv
import io
import json
import os
import re
import tarfile
import zipfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from maskalign.data.build import build
from maskalign.data.build.webdataset_source import expand_braces
from maskalign.errors import RunError, UsageError
from tests.on_disk import png, write_folder, write_tar

COLORS = {"cat": (200, 30, 30), "dog": (30, 200, 30), "eel": (30, 30, 200)}


def class_files(counts, prefix=""):
    """{PREFIX/CLASS/number.png: bytes}, each picture in the color of its class."""
    return {
        f"{prefix}{label}/{number:02d}.png": png(COLORS[label]) for label in counts for number in range(counts[label])
    }


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def tar_bytes(files, folder):
    return write_tar(folder / "inner.bin", files).read_bytes()


def read_back(folder, ending="png"):
    """[(key, label, picture array)] through webdataset's own reader."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("rgb8"):
        found.append((sample["__key__"], sample["cls"], sample[ending]))
    return found


def shard_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def make(source, out, **changes):
    return build(source, out, **({"size": 8, "workers": 0, "quiet": True} | changes))


COUNTS = {"dog": 5, "cat": 7, "eel": 3}


def test_labels_are_the_places_of_the_sorted_folder_names(tmp_path):
    manifest = make(write_folder(tmp_path / "set", class_files(COUNTS)), tmp_path / "out", shard_size=4)
    assert manifest.class_names == ["cat", "dog", "eel"]
    assert manifest.source == "folder set" and str(tmp_path) not in manifest.to_json()
    found = read_back(tmp_path / "out")
    assert len({key for key, _, _ in found}) == len(found) == manifest.num_samples == 15
    for key, label, picture in found:
        assert "." not in key and picture.shape == (8, 8, 3)
        assert np.abs(picture.astype(int) - COLORS[manifest.class_names[label]]).max() <= 1
    labels = [label for _, label, _ in found]
    assert labels != sorted(labels) and [labels.count(i) for i in range(3)] == [7, 5, 3]


@pytest.mark.parametrize("prefix", ["", "set/train/"])
def test_class_folders_without_an_image_are_named(tmp_path, capsys, prefix):
    source = write_folder(tmp_path / "set", class_files(COUNTS, prefix) | {f"{prefix}fox/images/0.png": png((9, 9, 9))})
    for name in ("deer", ".hidden", "ant/images", "dog/masks"):
        (source / prefix / name).mkdir(parents=True)
    (source / prefix / "ant" / "readme.txt").write_text("none")
    manifest = make(source, tmp_path / "out", quiet=False)
    assert manifest.class_names == ["cat", "dog", "eel", "fox"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "contain no image" in line)
    assert line.startswith("2 folders") and line.endswith(f": {prefix}ant, {prefix}deer")


def test_every_kind_of_container_gives_the_same_shards(tmp_path):
    files = class_files(COUNTS, "a/b/")
    sources = [
        write_folder(tmp_path / "folder", files),
        write_zip(tmp_path / "z.zip", dict(reversed(files.items()))),
        write_tar(tmp_path / "t.tar", files),
        write_tar(tmp_path / "t.tar.gz", files, "w:gz"),
        write_tar(tmp_path / "t.tar.xz", files, "w:xz"),
        write_tar(tmp_path / "misnamed.zip", files, "w:bz2"),
    ]
    built = []
    for number, source in enumerate(sources):
        make(source, tmp_path / f"out{number}", shard_size=6)
        assert not (tmp_path / f"out{number}" / ".build").exists()
        built.append(shard_bytes(tmp_path / f"out{number}"))
    assert len(built[0]) == 3 and all(shards == built[0] for shards in built[1:])


def test_a_tar_of_tars_has_a_class_in_each(tmp_path):
    """As ImageNet's training archive: n01440764.tar and so on inside, images directly in them."""
    inner = {
        f"{label}.tar": tar_bytes({f"{label}_{i}.png": png(COLORS[label]) for i in range(3)}, tmp_path)
        for label in ("dog", "cat")
    }
    manifest = make(write_tar(tmp_path / "train.tar", inner), tmp_path / "out")
    assert manifest.class_names == ["cat", "dog"] and manifest.num_samples == 6
    for _, label, picture in read_back(tmp_path / "out"):
        assert np.abs(picture.astype(int) - COLORS[manifest.class_names[label]]).max() <= 1


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_train_and_test_are_never_mixed(tmp_path, kind):
    files = class_files({"cat": 4, "dog": 3}, "set/train/") | class_files({"cat": 2, "dog": 2}, "set/test/")
    write = {"folder": write_folder, "zip": write_zip, "tar": write_tar}[kind]
    source = write(tmp_path / f"source.{kind}", files)
    with pytest.raises(UsageError, match=r"set/test \(4 images\), set/train \(7 images\).*--subset") as caught:
        make(source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    train = make(source, tmp_path / "train", subset="train")
    assert train.num_samples == 7 and train.class_names == ["cat", "dog"] and train.source.endswith("train")
    assert make(source, tmp_path / "test", subset="set/test").num_samples == 4
    with pytest.raises(UsageError, match="no images below 'valid'.*set/train"):
        make(source, tmp_path / "out", subset="valid")


def test_classes_in_groups_are_leaves_but_not_one_class_in_two_places(tmp_path):
    grouped = write_folder(tmp_path / "good", class_files({"cat": 2}, "fur/") | class_files({"eel": 2}, "wet/"))
    assert make(grouped, tmp_path / "out", class_folders="leaf").class_names == ["cat", "eel"]
    twice = write_folder(tmp_path / "bad", class_files({"cat": 2}, "one/") | class_files({"cat": 2}, "two/"))
    with pytest.raises(UsageError, match="one/cat and two/cat have the same last folder; give --class-folders path"):
        make(twice, tmp_path / "out2", class_folders="leaf")


def test_tiny_imagenets_images_folders_are_no_classes(tmp_path):
    files = {f"train/{label}/images/{i}.png": png(COLORS[label]) for label in ("cat", "dog") for i in range(2)}
    assert make(write_folder(tmp_path / "set", files), tmp_path / "out").class_names == ["cat", "dog"]


def test_what_is_no_image_of_the_set_is_passed_over(tmp_path):
    files = class_files({"cat": 2, "dog": 2}) | {
        "README.md": b"hello", "cat/notes.txt": b"x", "cat/._00.png": b"shadow", "__MACOSX/cat/00.png": b"shadow",
        ".git/cat/00.png": b"x", "dog/.DS_Store": b"x", "dog/png": b"no ending",
    }  # fmt: skip
    for number, source in enumerate([write_folder(tmp_path / "a", files), write_zip(tmp_path / "a.zip", files)]):
        manifest = make(source, tmp_path / f"out{number}")
        assert manifest.num_samples == 4 and manifest.class_names == ["cat", "dog"]
        assert not (tmp_path / f"out{number}" / "bad.csv").exists()


def test_images_outside_class_folders_are_listed(tmp_path):
    source = write_folder(tmp_path / "set", class_files({"cat": 9}) | {"stray.png": png((1, 2, 3))})
    manifest = make(source, tmp_path / "out", max_bad_fraction=0.1)
    assert manifest.num_samples == 9
    assert "stray.png,lies outside any class folder" in (tmp_path / "out" / "bad.csv").read_text()


def test_names_and_links_in_archives_lead_nowhere(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png((9, 9, 9)))
    path = write_tar(tmp_path / "evil.tar", class_files({"cat": 3}) | {"../../dog/x.png": png((1, 1, 1))})
    with tarfile.open(path, "a") as tar:
        for kind, name in ((tarfile.SYMTYPE, "cat/link.png"), (tarfile.LNKTYPE, "cat/hard.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
        fifo = tarfile.TarInfo("cat/fifo.png")
        fifo.type = tarfile.FIFOTYPE
        tar.addfile(fifo)
        absolute = tarfile.TarInfo(str(tmp_path / "eel" / "abs.png"))
        absolute.size = len(png((2, 2, 2)))
        tar.addfile(absolute, io.BytesIO(png((2, 2, 2))))
    before = sorted(os.listdir(tmp_path))
    manifest = make(path, tmp_path / "out", max_bad_fraction=0.5, class_folders="leaf")
    assert sorted(os.listdir(tmp_path)) == sorted([*before, "out"])
    assert sorted(os.listdir(tmp_path / "out")) == ["bad.csv", "manifest.json", "shard-000000.tar"]
    assert manifest.num_samples == 4 and manifest.class_names == ["cat", "eel"]
    with open(tmp_path / "out" / "bad.csv", newline="") as file:
        rows = dict(list(csv.reader(file))[1:])
    assert sorted(rows) == ["../../dog/x.png", "cat/fifo.png", "cat/hard.png", "cat/link.png"]

    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        for name, data in class_files({"cat": 3}).items():
            archive.writestr(name, data)
        link = zipfile.ZipInfo("cat/link.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(secret))
    assert make(tmp_path / "evil.zip", tmp_path / "out2", max_bad_fraction=0.5).num_samples == 3
    assert "a link to " in (tmp_path / "out2" / "bad.csv").read_text()


def test_links_between_folders_are_followed_once(tmp_path):
    write_folder(tmp_path / "set", class_files({"cat": 2}))
    write_folder(tmp_path / "elsewhere", class_files({"dog": 2}))
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere" / "dog")
    (tmp_path / "set" / "cat" / "loop").symlink_to(tmp_path / "set")
    assert make(tmp_path / "set", tmp_path / "out").num_samples == 4


@pytest.mark.parametrize("mode", ["w", "w:gz", "zip"])
def test_an_archive_cut_short_is_an_error_and_not_a_smaller_data_set(tmp_path, mode):
    path = tmp_path / "source"
    write_zip(path, class_files(COUNTS)) if mode == "zip" else write_tar(path, class_files(COUNTS), mode)
    data = path.read_bytes().rstrip(b"\0")
    path.write_bytes(data[: len(data) * 3 // 4 // 512 * 512 + 100])
    with pytest.raises((RunError, UsageError), match="damaged") as caught:
        make(path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_zip_of_a_version_to_come_is_named_as_that(tmp_path):
    path = tmp_path / "new.zip"
    write_zip(path, class_files(COUNTS))
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 6] = 99  # the version that reading the first member needs
    path.write_bytes(data)
    with pytest.raises(RunError, match="cannot be read here .*version.*pack the images again"):
        make(path, tmp_path / "out")


def test_a_damaged_header_inside_a_tar_is_noticed(tmp_path):
    path = write_tar(tmp_path / "t.tar", class_files(COUNTS))
    data = bytearray(path.read_bytes())
    data[5 * 1024 + 10] ^= 255
    path.write_bytes(data)
    with pytest.raises(RunError, match="no valid header"):
        make(path, tmp_path / "out")


@pytest.mark.parametrize("source", ["pipe:cat x.tar", "http://host/x.zip", "s3://bucket/x", "imagenet", "torchvision"])
def test_what_cannot_be_a_source(tmp_path, source):
    with pytest.raises(UsageError, match="pipe: commands are refused|this machine|does not exist") as caught:
        make(source, tmp_path / "out")
    assert source in str(caught.value) and not (tmp_path / "out").exists()


def test_an_empty_folder_or_a_text_file(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no images"):
        make(tmp_path / "empty", tmp_path / "out")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UsageError, match="neither a folder nor"):
        make(tmp_path / "text", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    write_folder(tmp_path / "set", class_files({"cat": 2}))
    with pytest.raises(UsageError, match="class_names is for webdataset"):
        make(tmp_path / "set", tmp_path / "out", class_names=["cat"])
    with pytest.raises(UsageError, match="same"):
        make(tmp_path / "set", tmp_path / "set")


def wds_shard(path, samples):
    """A shard of (key, {ending: bytes}) samples, written by plain tarfile."""
    return write_tar(path, {f"{key}.{ending}": data for key, members in samples for ending, data in members.items()})


def numbered(labels, ending="cls", text=str):
    names = sorted(COLORS)
    return [
        (f"d/{i:04d}", {"jpg": png(COLORS[names[label]]), ending: text(label).encode()})
        for i, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    "ending, text",
    [("cls", str), ("json", str), ("json", lambda label: json.dumps({"file": "x", "label": label}))],
)
def test_webdataset_shards_with_numbers(tmp_path, ending, text):
    for number, labels in enumerate([[0, 2, 1], [1, 1]]):
        wds_shard(tmp_path / f"s-{number:03d}.tar", numbered(labels, ending, text))
    for how, source in enumerate([tmp_path, f"{tmp_path}/s-{{000..001}}.tar", f"{tmp_path}/s-*.tar"]):
        out = tmp_path / f"out{how}"
        manifest = make(source, out)
        assert manifest.class_names == ["0", "1", "2"] and manifest.num_samples == 5
        for _, label, picture in read_back(out):
            assert np.abs(picture.astype(int) - COLORS[sorted(COLORS)[label]]).max() <= 1
    named = make(tmp_path / "s-000.tar", tmp_path / "named", class_names=["cat", "dog", "eel", "fox"])
    assert named.class_names == ["cat", "dog", "eel", "fox"] and named.num_samples == 3
    with pytest.raises(UsageError, match=r"label 2 is outside \[0, 2\)"):
        make(tmp_path, tmp_path / "out9", class_names=["cat", "dog"])


def test_webdataset_shards_with_class_names(tmp_path):
    wds_shard(tmp_path / "s.tar", numbered([2, 0, 0], text=lambda label: sorted(COLORS)[label]))
    assert make(tmp_path / "s.tar", tmp_path / "out").class_names == ["cat", "eel"]
    with pytest.raises(UsageError, match="'eel' is not among"):
        make(tmp_path / "s.tar", tmp_path / "out2", class_names=["cat", "dog"])


def test_webdataset_samples_without_label_or_image_are_listed(tmp_path):
    samples = numbered([0] * 60) + [
        ("d/a", {"jpg": png((1, 1, 1))}), ("d/b", {"cls": b"0"}), ("d/c", {"jpg": png((1, 1, 1)), "cls": b"\xff\xfe"}),
        ("d/d", {"jpg": png((1, 1, 1)), "json": b"{"}), ("d/e", {"jpg": png((1, 1, 1)), "json": b'{"x": 1}'}),
        ("d/f", {"jpg": b"not an image", "cls": b"0"}),
    ]  # fmt: skip
    wds_shard(tmp_path / "s.tar", samples)
    manifest = make(tmp_path / "s.tar", tmp_path / "out", max_bad_fraction=0.2)
    assert manifest.num_samples == 60
    listed = (tmp_path / "out" / "bad.csv").read_text()
    assert re.findall(r"s\.tar/d/(\w)\b", listed) == ["a", "b", "c", "d", "e", "f"]
    wds_shard(tmp_path / "n.tar", numbered([0]) + [("d/z", {"jpg": png((1, 1, 1)), "cls": b"-1"})])
    with pytest.raises(UsageError, match="label -1 is outside"):
        make(tmp_path / "n.tar", tmp_path / "out2")


def test_our_own_data_set_at_another_size(tmp_path):
    make(write_folder(tmp_path / "set", class_files(COUNTS)), tmp_path / "one", license="CC0", shard_size=6)
    manifest = make(tmp_path / "one", tmp_path / "two", size=5)
    assert manifest.resolution == 5 and manifest.class_names == ["cat", "dog", "eel"] and manifest.license == "CC0"
    assert {picture.shape for _, _, picture in read_back(tmp_path / "two")} == {(5, 5, 3)}


def test_brace_ranges():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{0..1}/{2..3}") == ["0/2", "0/3", "1/2", "1/3"]
    with pytest.raises(UsageError, match="million"):
        expand_braces("{0..99999999}")


def test_torchvision_data_sets(tmp_path, monkeypatch):
    import torchvision.datasets as datasets

    class Drawn:
        classes = ["cat", "dog"]

        def __init__(self, root, train=True, download=False):
            self.targets = [0, 1, 1] if train else [1]

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return Image.new("RGB", (9, 9), COLORS[self.classes[self.targets[index]]]), self.targets[index]

    monkeypatch.setattr(datasets, "Drawn", Drawn, raising=False)
    manifest = make("torchvision:Drawn", tmp_path / "train", root=tmp_path / "files")
    assert manifest.class_names == ["cat", "dog"] and manifest.num_samples == 3
    assert sorted(label for _, label, _ in read_back(tmp_path / "train")) == [0, 1, 1]
    assert make("torchvision:Drawn", tmp_path / "test", subset="test", root=tmp_path / "files").num_samples == 1
    with pytest.raises(UsageError, match="subsets train and test"):
        make("torchvision:Drawn", tmp_path / "x", subset="extra", root=tmp_path / "files")

    class Offline(Drawn):
        def __init__(self, root, train=True, download=False):
            raise RuntimeError("Dataset not found\nor corrupted")

    class Regression(Drawn):
        def __init__(self, root):
            self.targets = [[0.5, 1.5]]

    monkeypatch.setattr(datasets, "Offline", Offline, raising=False)
    monkeypatch.setattr(datasets, "Regression", Regression, raising=False)
    for name, message in [
        ("Offline", "needs a network.*--root"),
        ("Regression", "no integer class labels"),
        ("CIFAR11", "did you mean CIFAR10"),
        ("os", "no such data set"),
    ]:
        with pytest.raises(UsageError, match=message) as caught:
            make(f"torchvision:{name}", tmp_path / "x", root=tmp_path / "files")
        assert "\n" not in str(caught.value)


def test_torchvisions_own_fake_data(tmp_path, monkeypatch):
    import torchvision.datasets as datasets

    monkeypatch.setattr(datasets.FakeData.__init__, "__defaults__", (40, (3, 20, 20), 4, None, None, 0))
    manifest = make("torchvision:FakeData", tmp_path / "out")
    assert manifest.num_samples == 40 and manifest.class_names == ["0", "1", "2", "3"]
    truth = datasets.FakeData(40, (3, 20, 20), 4)
    labels = sorted(int(truth[i][1]) for i in range(40))
    assert sorted(label for _, label, _ in read_back(tmp_path / "out")) == labels
