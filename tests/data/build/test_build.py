"""The builder: the same bytes however it is run, killed, shared out and started again; limits; OpenMoji."""

import csv
import errno
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import pytest
import webdataset
from PIL import Image

from maskalign.data.build import check
from maskalign.data.build.building import build, read_names
from maskalign.data.format.manifest import Manifest
from maskalign.errors import RunError, UsageError

SETTINGS = {"size": 24, "shard_size": 30}
COMMAND = [sys.executable, "-m", "maskalign", "data", "build"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 400 noisy pictures in 4 classes, of various sizes and formats."""
    root = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0)
    for number in range(400):
        folder = root / f"class-{number % 4}"
        folder.mkdir(exist_ok=True)
        height, width = noise.integers(20, 90, 2)
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(folder / f"{number:03d}.{('png', 'jpg', 'webp')[number % 3]}")
    return root


@pytest.fixture(scope="module")
def truth(pictures, tmp_path_factory):
    """Every file of the data set as one undisturbed process builds it."""
    out = tmp_path_factory.mktemp("truth") / "out"
    build(pictures, out, workers=0, quiet=True, **SETTINGS)
    return contents(out)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def options(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def test_it_holds_what_the_folder_holds(pictures, truth):
    assert sorted(truth) == ["manifest.json", *(f"shard-{number:06d}.tar" for number in range(14))]
    manifest = Manifest.from_json(truth["manifest.json"])
    assert manifest.num_samples == 400 and manifest.resolution == 24 and manifest.channels == 3
    assert [shard.num_samples for shard in manifest.shards] == [30] * 13 + [10]
    assert manifest.class_names == ["class-0", "class-1", "class-2", "class-3"]
    labels = []
    for shard in manifest.shards:
        with tarfile.open(fileobj=io.BytesIO(truth[shard.name])) as tar:
            for info in tar:
                assert info.isreg() and (info.mtime, info.uid, info.gid, info.uname) == (0, 0, 0, "")
                if info.name.endswith(".cls"):
                    labels.append(int(tar.extractfile(info).read()))
    assert [labels.count(label) for label in range(4)] == [100] * 4
    assert len(set(labels[:30])) == 4  # a shard mixes the classes


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(pictures, truth, tmp_path, workers):
    build(pictures, tmp_path / "out", workers=workers, quiet=True, **SETTINGS)
    assert contents(tmp_path / "out") == truth


@pytest.mark.parametrize("workers, times", [(0, 4), (2, 2)])
def test_killed_at_random_moments_it_goes_on(pictures, truth, tmp_path, workers, times, seed):
    draw = random.Random(seed)
    out = tmp_path / "out"
    command = [*COMMAND, str(pictures), "--out", str(out), *options(workers=workers, **SETTINGS)]
    kills = 0
    while kills < times:
        before = len(list(out.glob("*.tar"))) if out.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        # At least one new shard, so that it ends some day; then a random moment later.
        while process.poll() is None and len(list(out.glob("*.tar"))) <= before:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.1))
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        kills += 1
    assert kills > 0
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "400 images, 4 classes, 14 shards" in done.stdout
    assert contents(out) == truth


def test_a_worker_that_is_killed_ends_it_in_one_line_and_it_goes_on(pictures, truth, tmp_path):
    stop = threading.Event()

    def kill_one():
        while not stop.is_set():
            for child in multiprocessing.active_children():
                if list((tmp_path / "out").glob("*.tar")):
                    child.kill()
                    return
            time.sleep(0.002)

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        with pytest.raises(RunError, match="worker process died.*to resume") as caught:
            build(pictures, tmp_path / "out", workers=2, quiet=True, **SETTINGS)
    finally:
        stop.set()
        killer.join()
    assert "\n" not in str(caught.value)
    build(pictures, tmp_path / "out", workers=2, quiet=True, **SETTINGS)
    assert contents(tmp_path / "out") == truth


def test_ranks_share_the_work(pictures, truth, tmp_path):
    command = [*COMMAND, str(pictures), "--out", str(tmp_path / "out"), *options(workers=0, **SETTINGS)]
    ranks = [
        subprocess.Popen(
            command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (2, 1, 0)
    ]  # fmt: skip
    out = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], out
    assert contents(tmp_path / "out") == truth
    assert "400 images" in out[2][0] and out[0][0] == out[1][0] == ""  # one of them speaks


@pytest.mark.slow  # torchrun itself takes ten seconds; the test above covers what it sets
@pytest.mark.distributed
def test_under_torchrun(pictures, truth, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "maskalign", "data", "build", str(pictures), "--out", str(tmp_path / "out"), *options(**SETTINGS)]
    done = subprocess.run(launch + command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == truth


def test_a_rank_whose_fellows_never_come_says_so(pictures, tmp_path):
    with pytest.raises(RunError, match="shard-000001.tar of another rank"):
        build(pictures, tmp_path / "a", rank=0, world_size=2, wait_seconds=0.3, workers=0, quiet=True, **SETTINGS)
    with pytest.raises(RunError, match="rank 0 to list the source"):
        build(pictures, tmp_path / "b", rank=1, world_size=2, wait_seconds=0.3, workers=0, quiet=True, **SETTINGS)


def test_a_finished_data_set_is_left_alone(pictures, tmp_path, capsys):
    for _ in range(2):
        build(pictures, tmp_path / "out", workers=0, **SETTINGS)
    assert "complete already: 400 images" in capsys.readouterr().out
    (tmp_path / "out" / "shard-000003.tar").unlink()
    with pytest.raises(RunError, match="shard-000003.tar is missing"):
        build(pictures, tmp_path / "out", workers=0, quiet=True, **SETTINGS)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    "change, named",
    [({"size": 32}, "size 24"), ({"shard_size": 31}, "shard_size 30"), ({"crop": "resize"}, "crop 'adm'"),
     ({"seed": 1}, "seed 0"), ({"image_format": "jpg"}, "image_format 'png'"), ({"license": "CC0"}, "images")],
)  # fmt: skip
def test_other_settings_in_the_same_folder(pictures, tmp_path, monkeypatch, finished, change, named):
    if not finished:
        stop_after(monkeypatch, shards=2)
    with pytest.raises(UsageError, match="other settings: " + named) as caught:
        try:
            build(pictures, tmp_path / "out", workers=0, quiet=True, **SETTINGS)
        except KeyboardInterrupt:
            monkeypatch.undo()
        before = contents(tmp_path / "out")
        build(pictures, tmp_path / "out", workers=0, quiet=True, **(SETTINGS | change))
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


def stop_after(monkeypatch, shards):
    """Make the process end, as by Ctrl-C, after a number of shards."""
    import maskalign.data.build.prepare as prepare

    original, count = prepare.make_shard, iter(range(shards))

    def make_shard(*arguments, **named):
        if next(count, None) is None:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(prepare, "make_shard", make_shard)


def test_a_build_that_was_stopped_before_its_first_shard_leaves_nothing_behind(pictures, truth, tmp_path, monkeypatch):
    stop_after(monkeypatch, shards=0)
    with pytest.raises(KeyboardInterrupt):
        build(pictures, tmp_path / "out", workers=0, quiet=True, **(SETTINGS | {"size": 32}))
    monkeypatch.undo()
    build(pictures, tmp_path / "out", workers=0, quiet=True, **SETTINGS)
    assert contents(tmp_path / "out") == truth


def test_a_changed_source_is_noticed(pictures, tmp_path):
    source = tmp_path / "source"
    for label in ("a", "b"):
        (source / label).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (9, 9)).save(source / label / f"{number}.png")
    build(source, tmp_path / "out", workers=0, quiet=True)
    Image.new("RGB", (9, 9)).save(source / "a" / "new.png")
    with pytest.raises(UsageError, match="images '6 .*now '7 "):
        build(source, tmp_path / "out", workers=0, quiet=True)


def test_a_folder_with_something_else(pictures, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.tar").write_bytes(b"x")
    with pytest.raises(UsageError, match="mine.tar of another data set"):
        build(pictures, tmp_path / "out", workers=0, quiet=True)
    assert os.listdir(tmp_path / "out") == ["mine.tar"]
    with pytest.raises(UsageError, match="is a file"):
        build(pictures, tmp_path / "out" / "mine.tar", workers=0, quiet=True)


def test_bad_images_are_listed_and_limited(pictures, tmp_path):
    source = tmp_path / "source"
    (source / "a").mkdir(parents=True)
    for number in range(40):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(source / "a" / f"{number:02d}.png")
    (source / "a" / "05.png").write_bytes(b"not an image")
    (source / "a" / "17.png").write_bytes((source / "a" / "18.png").read_bytes()[:50])
    Image.new("1", (10_000, 10_000)).save(source / "a" / "30.png")  # a hundred megapixels in 12 kB
    (source / "a" / "31.png").write_bytes(b"")
    built = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        manifest = build(source, out, workers=workers, shard_size=7, max_bad_fraction=0.1, size=8, quiet=True)
        assert manifest.num_samples == 36 and sum(shard.num_samples for shard in manifest.shards) == 36
        with open(out / "bad.csv", newline="") as file:
            rows = list(csv.reader(file))
        assert [row[0] for row in rows] == ["image", "a/05.png", "a/17.png", "a/30.png", "a/31.png"]
        assert "10000x10000" in rows[3][1]
        assert check(out) == []
        built.append(contents(out))
    assert built[0] == built[1]
    with pytest.raises(RunError, match=r"of 40 images are bad, over max_bad_fraction 0.09.*a/\d\d.png: ") as caught:
        build(source, tmp_path / "out", workers=0, max_bad_fraction=0.09, size=8, quiet=True)
    assert "\n" not in str(caught.value) and not (tmp_path / "out" / "manifest.json").exists()
    build(source, tmp_path / "out", workers=0, max_bad_fraction=0.1, size=8, quiet=True)  # and it goes on from there
    for path in (source / "a").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RunError, match="none of the 40 images"):
        build(source, tmp_path / "none", workers=0, max_bad_fraction=1.0, size=8, quiet=True)


def test_a_full_disk_is_one_line_and_leaves_no_half_shard(pictures, tmp_path, monkeypatch):
    import maskalign.data.format.tar_shards as shards

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shards.os, "fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        build(pictures, tmp_path / "out", workers=0, quiet=True, **SETTINGS)
    assert not list((tmp_path / "out").rglob("*.tar*"))


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"size": 10_000}, {"crop": "middle"}, {"image_format": "gif"}, {"shard_size": 0}, {"workers": -1},
     {"max_bad_fraction": 1.5}, {"max_bad_fraction": -0.1}],
)  # fmt: skip
def test_a_wrong_setting_is_named_before_anything_is_made(tmp_path, wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        build("openmoji", tmp_path / "out", quiet=True, **wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["jpg", "webp"])
def test_other_image_formats(pictures, tmp_path, how):
    manifest = build(pictures, tmp_path / "out", workers=0, image_format=how, size=16, quiet=True)
    assert manifest.image_format == how and check(tmp_path / "out", decode=True) == []
    urls = [manifest.shard_path(shard) for shard in manifest.shards]
    sample = next(iter(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8")))
    assert sample[how].shape == (16, 16, 3)


def test_class_names_from_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("one\ntwo words\n\u00e9\n", encoding="utf-8")
    assert read_names(tmp_path / "names.txt") == ["one", "two words", "\u00e9"]
    with pytest.raises(UsageError, match="missing.txt"):
        read_names(tmp_path / "missing.txt")


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    out = tmp_path_factory.mktemp("emoji") / "out"
    done = subprocess.run([*COMMAND, "openmoji", "--out", str(out), "--size", "16"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_openmoji(emoji):
    out, said = emoji
    manifest = Manifest.load(out)
    # 1,903 base emoji, without the five bare skin tone modifiers of the category Component
    assert manifest.num_samples == 1898 and manifest.resolution == 16
    assert manifest.class_names == [
        "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
        "Symbols", "Travel & Places",
    ]  # fmt: skip
    assert manifest.license.startswith("CC BY-SA 4.0") and "OpenMoji" in manifest.license
    assert "CC BY-SA 4.0" in said and "OpenMoji" in said and "1,898 images, 9 classes" in said
    assert check(out, decode=True) == []
    urls = [manifest.shard_path(shard) for shard in manifest.shards]
    by_class = {label: [] for label in range(9)}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"):
        by_class[sample["cls"]].append(sample["png"])
    pictures = np.concatenate(list(by_class.values()))
    assert pictures.shape == (1898, 16, 16, 3)
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) > 3 for picture in pictures)  # none is blank
    assert len(np.unique(pictures.reshape(len(pictures), -1), axis=0)) > 1850
    assert (pictures[:, 0, 0] > 240).all(axis=1).mean() > 0.9  # on white
    ink = (pictures < 250).any(axis=3)
    rows, columns = ink.any(axis=2), ink.any(axis=1)
    for there in (rows, columns):  # centered, and large
        first, last = there.argmax(axis=1), there.shape[1] - 1 - there[:, ::-1].argmax(axis=1)
        assert np.abs(first + last - 15).max() <= 3
    assert (np.maximum(rows.sum(axis=1), columns.sum(axis=1)) >= 10).mean() > 0.95
    faces, flags = (np.stack(by_class[label]).astype(int) for label in (6, 2))
    yellow = (faces[..., 0] > 200) & (faces[..., 1] > 170) & (faces[..., 2] < 120)
    others = np.stack(by_class[1]).astype(int)
    others = (others[..., 0] > 200) & (others[..., 1] > 170) & (others[..., 2] < 120)
    assert yellow.mean() > 0.07 > 2 * others.mean()  # smileys are yellow, animals are not
    assert (flags < 250).any(axis=3).any(axis=1).sum(axis=1).mean() > 13  # flags are wide


def test_plain_tar_lists_a_shard(emoji):
    out, _ = emoji
    listing = subprocess.run(["tar", "tf", str(out / "shard-000001.tar")], capture_output=True, text=True, check=True)
    assert listing.stderr == ""
    assert listing.stdout.split()[:3] == ["00000064.cls", "00000064.png", "00000065.cls"]


def test_building_and_checking_never_import_torch(pictures, tmp_path):
    code = f"""
import sys
from maskalign.data.build import build
from maskalign.data.build import check
build({str(pictures)!r}, {str(tmp_path / "out")!r}, workers=0, quiet=True, size=8)
check({str(tmp_path / "out")!r}, quiet=True)
print([name for name in ("torch", "torchvision", "webdataset") if name in sys.modules])
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_plan_is_in_the_manifest(truth):
    plan = json.loads(truth["manifest.json"])["build"]
    assert plan["settings"]["size"] == 24 and plan["settings"]["crop"] == "adm" and len(plan["fingerprint"]) == 64
