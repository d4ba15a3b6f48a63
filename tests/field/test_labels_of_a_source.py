"""Labels that would be wrong in silence: other people's layouts, numbers as names, holes, repeated names, nesting."""

import json

import pytest

RED, GREEN, BLUE, GRAY = (200, 30, 30), (30, 200, 30), (30, 30, 200), (90, 90, 90)


def edm(on_disk, colors, prefix=""):
    """(files, names) of StyleGAN's layout, in folders of 1,000."""
    names = [f"{number // 1000:05d}/img{number:08d}.png" for number in range(0, 1000 * len(colors), 1000)]
    return {prefix + name: on_disk.png(color) for name, color in zip(names, colors, strict=True)}, names


def table(names, labels, **more):
    return json.dumps({"labels": [[name, label] for name, label in zip(names, labels, strict=True)]} | more).encode()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_edm_layout_has_its_labels_in_dataset_json(on_disk, build, tmp_path, kind):
    files, names = edm(on_disk, [RED, GREEN, BLUE, GRAY])
    files["dataset.json"] = table(names, [2, 0, 1, 2])
    source = getattr(on_disk, kind)(f"edm.{kind}", files)
    status, manifest, said, _ = build(source)
    assert status == 0 and manifest.class_names == ["0", "1", "2"] and manifest.num_samples == 4
    assert on_disk.labels(tmp_path / "out") == {RED: 2, GREEN: 0, BLUE: 1, GRAY: 2}
    assert "3 classes from the labels in dataset.json: 0 (1), 1 (1), 2 (2)" in said


def test_names_for_the_labels_of_dataset_json(on_disk, build, tmp_path):
    files, names = edm(on_disk, [RED, GREEN])
    own = on_disk.folder("own", files | {"dataset.json": table(names, [1, 0], class_names=["cat", "dog"])})
    assert build(own, out="a")[1].class_names == ["cat", "dog"]
    plain = on_disk.folder("plain", files | {"dataset.json": table(names, [1, 0])})
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    assert build(plain, "--class_names", tmp_path / "names.txt", out="b")[1].class_names == ["ant", "bee"]


@pytest.mark.parametrize("labels", [[[0, 1.0], [1, 0]], [1.0, 0.0], ["dog", "cat"]])
def test_other_spellings_of_a_label(on_disk, build, tmp_path, labels):
    files, names = edm(on_disk, [RED, GREEN])
    names = [name.replace("/", "\\") for name in names]
    assert build(on_disk.folder("a", files | {"dataset.json": table(names, labels)}))[0] == 0
    assert on_disk.labels(tmp_path / "out") == {RED: 1, GREEN: 0}


@pytest.mark.parametrize(
    "text, match",
    [
        (b'{"labels": null}', "has no labels; give --class-folders none"),
        (b"{}", "has no labels"),
        (b'{"labels": []}', "has no labels"),
        (b"[1, 2]", "has no labels"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"labels": [["a", 1, 2]]}', "not pairs"),
        (b'{"labels": 5}', "not pairs"),
        (b'{"labels": [["nothing.png", 1]]}', "names none of the pictures"),
        (b'{"labels": [["00000/img00000000.png", [0.5, 0.5]]]}', "neither a class number nor a name"),
        (b'{"labels": [["00000/img00000000.png", -1]]}', "label -1 is outside"),
        (b'{"labels": [["00000/img00000000.png", 0.5]]}', "neither a class number nor a name"),
        (b'{"labels": [["00000/img00000000.png", 1], ["00000/img00000000.png", 2]]}', "has two labels"),
        (b'{"labels": [["00000/img00000000.png", "\\ud800"]]}', "is not UTF-8"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_dataset_json_without_usable_labels_is_one_line(on_disk, build, tmp_path, kind, text, match):
    files, _ = edm(on_disk, [RED, GREEN])
    status, manifest, _, error = build(getattr(on_disk, kind)("edm", files | {"dataset.json": text}))
    assert status == 2 and manifest is None and match in error, error
    assert not (tmp_path / "out").exists()


def test_pictures_and_labels_that_lack_the_other_are_listed(on_disk, build, tmp_path):
    files, names = edm(on_disk, [RED, GREEN, BLUE])
    files["dataset.json"] = table([*names[:2], "00009/img00009000.png"], [0, 1, 1])
    status, manifest, _, _ = build(on_disk.folder("edm", files), "--max_bad_fraction", 0.5)
    assert status == 0 and manifest.num_samples == 2
    assert on_disk.bad(tmp_path / "out") == {
        "00002/img00002000.png": "has no label in dataset.json",
        "00009/img00009000.png": "is named in dataset.json, but does not exist",
    }


def test_two_of_them_are_two_parts(on_disk, build):
    one, names = edm(on_disk, [RED, GREEN], "train/")
    two, _ = edm(on_disk, [BLUE, GRAY], "val/")
    parts = {f"{part}/dataset.json": table(names, [0, 1]) for part in ("train", "val")}
    source = on_disk.zip("both.zip", one | two | parts)
    status, _, _, error = build(source)
    assert status == 2 and "several folders have a dataset.json: train, val" in error and "--subset val" in error
    assert build(source, "--subset", "train", out="train")[1].num_samples == 2


def test_running_folders_without_dataset_json_are_no_classes(on_disk, build, tmp_path):
    files, _ = edm(on_disk, [RED, GREEN])
    edm_layout = on_disk.folder("edm", files)
    status, _, _, error = build(edm_layout)
    assert status == 2 and "only number the images" in error and "dataset.json" in error
    downloaded = {f"{shard:05d}/{shard:05d}{number:04d}.jpg": on_disk.png() for shard in (0, 1) for number in (0, 1)}
    assert "only number the images" in build(on_disk.folder("img2dataset", downloaded))[3]
    assert build(edm_layout, "--class-folders", "none", out="one")[1].class_names == ["edm"]
    assert build(edm_layout, "--class-folders", "top", out="top")[1].class_names == ["00000", "00001"]
    real = on_disk.folder("zip codes", {"10115/1.png": on_disk.png(RED), "80331/2.png": on_disk.png(GREEN)})
    assert build(real, out="real")[1].class_names == ["10115", "80331"]


def test_class_folders_with_numbers_count_as_numbers(on_disk, build, tmp_path):
    colors = {str(number): (20 * number, 90, 90) for number in range(12)}
    source = on_disk.folder("set", {f"{name}/a.png": on_disk.png(color) for name, color in colors.items()})
    _, manifest, said, _ = build(source)
    assert manifest.class_names == [str(number) for number in range(12)] and "note" not in said
    assert on_disk.labels(tmp_path / "out") == {color: int(name) for name, color in colors.items()}
    odd = on_disk.folder("odd", {f"{name}/a.png": on_disk.png() for name in ("10", "9", "100", "cat", "b2", "b10")})
    assert build(odd, out="odd_")[1].class_names == ["9", "10", "100", "b10", "b2", "cat"]


def test_numbers_that_are_not_their_labels_are_said(on_disk, build):
    source = on_disk.folder("set", {f"{name}/a.png": on_disk.png() for name in ("1", "2", "3")})
    _, manifest, said, _ = build(source)
    assert manifest.class_names == ["1", "2", "3"] and "differ from the labels: label 0 is class '1'" in said


def shard(on_disk, labels, name="s.tar", ending="cls"):
    """One sample for each label, its color told by the label's place."""
    files = {}
    for number, label in enumerate(labels):
        files[f"{number:04d}.png"] = on_disk.png((20 * number, 50, 50))
        files[f"{number:04d}.{ending}"] = label if isinstance(label, bytes) else str(label).encode()
    return on_disk.tar(name, files)


@pytest.mark.parametrize(
    "labels, missing, names",
    [
        ([1, 2, 3], "no image has the label 0:", ["1", "2", "3"]),
        ([0, 7, 2, 7], "no image has the label 1, 3-6:", ["0", "2", "7"]),
    ],
)
def test_holes_between_labels_are_asked_about(on_disk, build, tmp_path, labels, missing, names):
    source = shard(on_disk, labels)
    status, _, _, error = build(source)
    assert status == 2 and missing in error and "--holes close" in error and "--holes keep" in error
    _, manifest, said, _ = build(source, "--holes", "close", out="closed")
    assert manifest.class_names == names and "holes closed" in said
    expected = {(20 * number, 50, 50): names.index(str(label)) for number, label in enumerate(labels)}
    assert on_disk.labels(tmp_path / "closed") == expected
    _, manifest, said, _ = build(source, "--holes", "keep", out="kept")
    assert manifest.class_names == [str(number) for number in range(max(labels) + 1)]
    assert on_disk.labels(tmp_path / "kept") == {(20 * n, 50, 50): label for n, label in enumerate(labels)}
    assert "have no image and cannot be learned" in said


def test_holes_that_names_explain_are_said_with_the_right_names(on_disk, build, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\ndog\n")
    source = shard(on_disk, [1, 3])
    _, manifest, said, _ = build(source, "--class_names", tmp_path / "names.txt")
    assert manifest.class_names == ["ant", "bee", "cow", "dog"]
    assert "2 of 4 classes have no image and cannot be learned: 0 (ant), 2 (cow)" in said
    closed = build(source, "--class_names", tmp_path / "names.txt", "--holes", "close", out="closed")[1]
    assert closed.class_names == ["bee", "dog"]


def test_holes_in_dataset_json_are_the_same_fault(on_disk, build):
    files, names = edm(on_disk, [RED, GREEN])
    source = on_disk.zip("edm.zip", files | {"dataset.json": table(names, [1, 2])})
    status, _, _, error = build(source)
    assert status == 2 and "no image has the label 0:" in error


def test_names_in_json_that_are_numbers_count_as_numbers(on_disk, build, tmp_path):
    source = shard(on_disk, [json.dumps({"label": str(n)}).encode() for n in (10, 9, 2)], ending="json")
    assert build(source)[1].class_names == ["2", "9", "10"]


@pytest.mark.parametrize(
    "text, match",
    [
        (
            "crane\ncat\ncrane\n",
            "'crane' is the name of the classes 0, 2; make the names different, for example 'crane (0)'",
        ),
        ("cat\n\ndog\n", "the name of class 1 is empty"),
    ],
)
def test_repeated_and_empty_names_are_found_before_the_work(on_disk, build, tmp_path, text, match):
    (tmp_path / "names.txt").write_text(text)
    status, _, _, error = build(shard(on_disk, [0, 1, 2]), "--class_names", tmp_path / "names.txt")
    assert status == 2 and match in error and "names.txt" in error
    assert not (tmp_path / "out").exists()
    files, names = edm(on_disk, [RED, GREEN])
    own = table(names, [0, 1], class_names=["crane", "crane"])
    assert "'crane' is the name" in build(on_disk.folder("edm", files | {"dataset.json": own}))[3]


def test_a_file_of_names_from_windows(on_disk, build, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufeffkot\r\npies\r\n\r\n".encode())
    assert build(shard(on_disk, [0, 1]), "--class_names", tmp_path / "names.txt")[1].class_names == ["kot", "pies"]


def test_torchvisions_repeated_names_are_told_apart():
    from types import SimpleNamespace

    from maskalign.data.build.torchvision_source import _names

    imagenet = SimpleNamespace(classes=[("crane",), ("tench", "Tinca"), ("crane",)], wnids=["n1", "n2", "n3"])
    assert _names(imagenet, 3) == ["crane (n1)", "tench, Tinca", "crane (n3)"]
    assert _names(SimpleNamespace(), 2) == ["0", "1"]


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_folders_inside_a_class_do_not_count(on_disk, build, tmp_path, kind):
    files = {"cat/1.png": on_disk.png(RED), "cat/kitten/2.png": on_disk.png(GREEN), "dog/3.png": on_disk.png(BLUE)}
    source = getattr(on_disk, kind)("pets", files)
    _, manifest, said, _ = build(source)
    assert manifest.class_names == ["cat", "dog"]
    assert on_disk.labels(tmp_path / "out") == {RED: 0, GREEN: 0, BLUE: 1}
    assert "1 pictures lie in folders below that of their class (cat/kitten, ...)" in said
    assert build(source, "--class-folders", "path", out="p")[1].class_names == ["cat", "cat/kitten", "dog"]
    assert build(source, "--class-folders", "leaf", out="l")[1].class_names == ["cat", "dog", "kitten"]
    del files["dog/3.png"]
    assert build(getattr(on_disk, kind)("pet", files), out="one")[1].class_names == ["cat"]


def test_a_class_with_folders_of_subjects_or_years(on_disk, build, tmp_path):
    files = {f"faces/{who}/{n}.png": on_disk.png(RED) for who in ("ann", "bob") for n in range(3)}
    files |= {f"places/2020/{n}.png": on_disk.png(BLUE) for n in range(2)}
    _, manifest, said, _ = build(on_disk.folder("set", files))
    assert manifest.class_names == ["faces", "places"]
    assert "2 classes from the top folders: faces (6), places (2)" in said
    assert on_disk.labels(tmp_path / "out") == {RED: 0, BLUE: 1}


def test_leaf_names_that_repeat(on_disk, build, tmp_path):
    files = {
        "a/apartment/outdoor/1.png": on_disk.png(RED), "a/airfield/2.png": on_disk.png(GREEN),
        "c/church/outdoor/3.png": on_disk.png(BLUE),
    }  # fmt: skip
    source = on_disk.folder("places365", files)
    assert build(source, out="top")[1].class_names == ["a", "c"]
    status, _, _, error = build(source, "--class-folders", "leaf")
    assert (
        status == 2
        and "a/apartment/outdoor and c/church/outdoor have the same last folder; give --class-folders path" in error
    )
    _, manifest, _, _ = build(source, "--class-folders", "path", out="path")
    assert manifest.class_names == ["a/airfield", "a/apartment/outdoor", "c/church/outdoor"]
    assert on_disk.labels(tmp_path / "path") == {RED: 1, GREEN: 0, BLUE: 2}


def test_train_and_test_inside_classes_or_without_them(on_disk, build):
    inside = {f"{c}/{part}/{part}.png": on_disk.png() for c in ("bottle", "cable") for part in ("train", "test")}
    source = on_disk.folder("mvtec", inside)
    status, _, _, error = build(source)
    assert status == 2 and "several folders: bottle/test (1 images)" in error and "--subset train" in error
    manifest = build(source, "--subset", "train", out="train")[1]
    assert manifest.class_names == ["bottle", "cable"] and manifest.num_samples == 2
    flat = on_disk.folder("coco", {"train2017/1.png": on_disk.png(), "val2017/2.png": on_disk.png()})
    status, _, _, error = build(flat)
    assert status == 2 and "--subset" in error
    manifest = build(flat, "--subset", "train2017", out="one")[1]
    assert manifest.class_names == ["train2017"] and manifest.num_samples == 1
    assert build(flat, "--class-folders", "top", out="two")[1].class_names == ["train2017", "val2017"]
    beside = on_disk.folder("beside", {"train/cat/1.png": on_disk.png(), "cat/1.png": on_disk.png()})
    assert build(beside)[0] == 2


def test_a_class_that_is_called_test_is_one(on_disk, build):
    source = on_disk.folder("set", {"test/1.png": on_disk.png(), "quiz/1.png": on_disk.png()})
    assert build(source)[1].class_names == ["quiz", "test"]


def test_a_preview_beside_the_classes_makes_no_class_of_their_folder(on_disk, build):
    files = {f"set/{c}/{n}.png": on_disk.png() for c in ("cat", "dog") for n in range(6)} | {
        "set/cover.png": on_disk.png()
    }
    source = on_disk.zip("set.zip", files)
    status, _, _, error = build(source)
    assert status == 2 and "set directly contains 1 pictures, and 12 in 2 folders (cat, dog, ...)" in error
    assert build(source, "--class-folders", "top", out="top")[1].class_names == ["set"]


def test_names_that_look_the_same_are_said(on_disk, build):
    source = on_disk.folder("set", {f"{c}/1.png": on_disk.png() for c in ("Cat", "cat", "caf\u00e9", "cafe\u0301")})
    assert "are two" in build(source)[2]


def test_a_class_without_a_usable_picture_is_said(on_disk, build):
    files = {f"cat/{n}.png": on_disk.png() for n in range(3)} | {"dog/0.png": b"no picture"}
    _, manifest, said, _ = build(on_disk.folder("set", files), "--max_bad_fraction", 0.5)
    assert manifest.class_names == ["cat", "dog"] and "these classes have no usable image" in said and "dog" in said
