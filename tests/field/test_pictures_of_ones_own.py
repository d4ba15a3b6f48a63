"""A first data set from a phone or a download: flat folders, strange endings, lists of what failed."""

import csv

import pytest
import yaml
from PIL import Image

RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_flat_folder_is_one_class_and_says_so(on_disk, build, tmp_path, kind):
    source = getattr(on_disk, kind)("holiday" if kind == "folder" else f"holiday.{kind}", {"1.png": on_disk.png(RED)})
    _, manifest, said, _ = build(source)
    assert manifest.class_names == ["holiday"] and on_disk.labels(tmp_path / "out") == {RED: 0}
    assert "1 class from a flat folder: holiday (1)" in said and "all are one class" in said


def test_a_folder_around_a_flat_one(on_disk, build):
    assert build(on_disk.zip("x.zip", {"holiday/1.png": on_disk.png()}))[1].class_names == ["holiday"]


def test_what_is_passed_over_is_counted_by_ending(on_disk, build):
    files = {"cat/1.png": on_disk.png(), "dog/2.png": on_disk.png(), "dog/none": b"x"}
    files |= {f"cat/{n}.HEIC": b"x" for n in range(12)} | {f"dog/{n}.jfif": b"x" for n in range(2)}
    for kind in ("folder", "zip", "tar"):
        said = build(getattr(on_disk, kind)(f"set.{kind}", files), out=kind)[2]
        assert "skipped files that are not readable pictures: .heic 12, .jfif 2, no ending 1" in said


def test_nothing_but_strange_endings_is_one_line(on_disk, build, tmp_path):
    source = on_disk.folder("set", {f"cat/{n}.heic": b"x" for n in range(3)})
    status, _, _, error = build(source)
    assert status == 2 and "no images found (skipped: .heic 3)" in error
    assert not (tmp_path / "out").exists()


def test_the_classes_are_printed_before_the_work(on_disk, build):
    files = {f"{letter}/{n}.png": on_disk.png() for letter in "abcdefghijkl" for n in range(2)}
    said = build(on_disk.folder("set", files))[2]
    assert said.startswith("12 classes from the top folders: a (2), b (2), ") and "j (2), ...\n" in said


def test_a_failed_build_leaves_the_list_of_what_is_bad(on_disk, build, tmp_path):
    files = {f"cat/{n}.png": on_disk.png() for n in range(4)} | {"cat/x.png": b"no picture", "stray.png": on_disk.png()}
    source = on_disk.folder("set", files)
    status, manifest, _, error = build(source, "--max_bad_fraction", 0.2)
    assert status == 1 and manifest is None and f"{tmp_path / 'out' / 'bad.csv'} lists" in error
    assert sorted(on_disk.bad(tmp_path / "out")) == ["cat/x.png", "stray.png"]
    source.joinpath("cat/x.png").write_bytes(on_disk.png(GREEN))  # mended, and the same command again
    status, manifest, _, _ = build(source, "--max_bad_fraction", 0.2)
    assert status == 0 and manifest.num_samples == 5 and list(on_disk.bad(tmp_path / "out")) == ["stray.png"]
    assert GREEN in on_disk.labels(tmp_path / "out")


def test_a_list_of_what_is_mended_goes(on_disk, build, tmp_path):
    source = on_disk.folder("set", {"cat/1.png": on_disk.png(), "cat/2.png": b"no picture"})
    assert build(source)[0] == 1 and on_disk.bad(tmp_path / "out")
    source.joinpath("cat/2.png").write_bytes(on_disk.png())
    assert build(source)[1].num_samples == 2 and not (tmp_path / "out" / "bad.csv").exists()


def test_a_source_without_one_usable_picture_is_listed_too(on_disk, build, tmp_path):
    root = on_disk.folder("set", {"cat/readme.txt": b"x"})
    for name in ("1.png", "2.png"):
        (root / "cat" / name).symlink_to(root / "gone.png")
    status, _, _, error = build(root)
    assert status == 2 and "no images found (cat/1.png: a link that leads nowhere" in error
    assert len(on_disk.bad(tmp_path / "out")) == 2


def test_a_full_disk_leaves_the_list(on_disk, build, tmp_path, monkeypatch):
    import maskalign.data.build.prepare as prepare

    original, calls = prepare.make_shard, []

    def make_shard(*arguments, **named):
        calls.append(1)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return original(*arguments, **named)

    monkeypatch.setattr(prepare, "make_shard", make_shard)
    files = {f"cat/{n}.png": on_disk.png() for n in range(9)} | {"cat/x.png": b"no picture", "stray.png": on_disk.png()}
    status, _, _, error = build(on_disk.folder("set", files), "--shard_size", 5, "--max_bad_fraction", 0.5)
    assert status == 1 and "No space left" in error
    with open(tmp_path / "out" / "bad.csv", newline="") as file:
        assert "stray.png" in {row[0] for row in csv.reader(file)}


def test_too_many_bad_names_are_found_before_the_work(on_disk, build, tmp_path):
    files = {"best/1.png": on_disk.png()} | {f"{n}.png": on_disk.png() for n in range(50)}
    status, _, _, error = build(on_disk.folder("set", files))
    assert status == 1 and "50 of 51 images are bad" in error and "lies outside any class folder" in error
    assert not list((tmp_path / "out").glob("*.tar"))


def test_from_a_folder_to_samples_with_the_recipe_for_it(on_disk, command, tmp_path):
    """The commands of docs/your-own-pictures.md, with a small model for two steps."""
    side = 64
    files = {
        f"{name}/{n}.png": on_disk.png(color) for name, color in (("red", RED), ("green", GREEN)) for n in range(4)
    }
    words = ["data", "build", on_disk.folder("pictures", files), "--out", tmp_path / "mine", "--size", side]
    assert command(*words, "--workers", 0)[0] == 0
    small = "--model.depth 2 --model.width 32 --model.heads 2 --model.patch_size 16 --model.projector_dim 16"
    small += " --training.batch_size 2 --training.max_steps 2 --preview.steps 1 --preview.per_class 1"
    small += " --data.num_workers 0 --training.tensorboard false --training.device cpu"
    words = ["train", "--data.path", tmp_path / "mine", "--config", f"pixels{side}", "--run_dir", tmp_path / "run"]
    status, _, error = command(*words, *small.split())
    assert status == 0, error
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert settings["teacher"]["names"] == ["efficientnet-lite0"] and settings["objective"]["time"] == "lognormal"
    words = ["sample", tmp_path / "run", "--out", tmp_path / "drawn", "--steps", 1, "--per-class", 2]
    status, _, error = command(*words)
    assert status == 0, error
    assert [Image.open(path).height >= 2 * side for path in (tmp_path / "drawn").glob("*.png")] == [True]
