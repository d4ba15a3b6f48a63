"""The contact sheet: pictures where they belong, features as colors, and something useful for half-broken sets."""

import io

import numpy as np
import pytest
from PIL import Image

from maskalign.data.build.showing import principal_colors, show
from maskalign.data.format.manifest import Manifest
from maskalign.data.format.tar_shards import write_shard
from maskalign.errors import RunError, UsageError
from maskalign.runtime.fonts import load_font

SIDE, TILE = 8, 64


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def color_of(label):
    return (40 * label + 20, 255 - 40 * label, 7 * label)


def write_set(folder, classes=4, per_class=3, teacher=None, moments=None, images=True, class_token=None):
    """A data set of plainly colored pictures; `teacher`, `class_token` and `moments` of a label give arrays."""
    folder.mkdir(exist_ok=True)
    samples = []
    for number in range(classes * per_class):
        label = number % classes
        members = {"cls": str(label).encode()}
        if images:
            members["png"] = png(np.full((SIDE, SIDE, 3), color_of(label), np.uint8))
        if moments:
            members["moments.npy"] = npy(moments(label))
        if teacher:
            members["net.npy"] = npy(teacher(label))
        if class_token:
            members["net.class.npy"] = npy(class_token(label))
        samples.append((f"{number:08d}", members))
    half = len(samples) // 2
    shards = [
        write_shard(folder / "shard-000000.tar", samples[:half]),
        write_shard(folder / "shard-000001.tar", samples[half:]),
    ]
    entry = {"tokens": 16, "dim": 12, "grid": [4, 4], "dtype": "int8", "normalize": "none"}
    if class_token:
        entry["class_token"] = {"dim": 12, "dtype": "float16", "kind": "prefix"}
    Manifest(
        len(samples), SIDE, [f"class {label}" for label in range(classes)], shards,
        image_format="png" if images else None, source="a test", license="CC BY-SA 4.0",
        teachers={"net": entry} if teacher else {},
        latent={"scale": 1.0, "bias": 0.0, "shape": [8, 4, 4], "dtype": "float16", "name": "x"} if moments else None,
    ).save(folder)  # fmt: skip
    return folder


def sheet_of(path, folder, **how):
    return np.asarray(Image.open(show(path, folder / "sheet.png", quiet=True, **how)))


def tiles(sheet, color):
    """Number of tiles' worth of pixels in exactly this color."""
    return (sheet == color).all(axis=2).sum() / TILE**2


def test_each_row_shows_its_class(tmp_path):
    sheet = sheet_of(write_set(tmp_path / "set"), tmp_path, columns=3)
    tops = []
    for label in range(4):
        there = (sheet == color_of(label)).all(axis=2)
        assert there.sum() == 3 * TILE**2
        rows = np.flatnonzero(there.any(axis=1))
        assert len(rows) == TILE
        tops.append(rows[0])
    assert tops == sorted(tops)
    assert sheet[-30:].min() < 150  # the license is written below
    label_column = sheet[tops[0] : tops[0] + TILE, :40]
    assert label_column.min() < 60  # and the name of the class on the left


def test_what_cannot_be_shown_is_one_line(tmp_path):
    path = write_set(tmp_path / "set")
    for how, match in (({"rows": 0}, "--rows: 0"), ({"columns": -1}, "--columns: -1")):
        with pytest.raises(UsageError, match=match):
            show(path, tmp_path / "sheet.png", quiet=True, **how)
    with pytest.raises(UsageError, match="is a folder"):
        show(path, tmp_path, quiet=True)
    with pytest.raises(UsageError, match="it is a file"):
        show(path, tmp_path / "set" / "manifest.json" / "sheet.png", quiet=True)


def test_names_with_accents_are_drawn():
    font = load_font(13)
    boxes = {bytes(font.getmask(letter)) for letter in "\U0010fffe\U000e0fff"}  # what stands for a letter that it lacks
    assert all(bytes(font.getmask(letter)) not in boxes for letter in "éüÅßñøЖλ")


def test_fewer_samples_and_more_classes_than_the_sheet_holds(tmp_path):
    path = write_set(tmp_path / "set", classes=6, per_class=2)
    sheet = sheet_of(path, tmp_path, columns=5, rows=3)
    assert [round(tiles(sheet, color_of(label))) for label in range(6)] == [2, 0, 2, 0, 0, 2]


def test_features_become_colors_that_tell_them_apart(tmp_path):
    noise = np.random.default_rng(0)
    centers = noise.normal(size=(2, 12))

    def teacher(label):
        grid = np.zeros((4, 4), int)
        grid[:, 2:] = 1  # left half one thing, right half another
        tokens = centers[grid.ravel()] + 0.02 * noise.normal(size=(16, 12))
        return np.clip(tokens * 40, -127, 127).astype(np.int8)

    plain = sheet_of(write_set(tmp_path / "plain"), tmp_path, columns=2)
    sheet = sheet_of(write_set(tmp_path / "set", teacher=teacher), tmp_path, columns=2)
    assert sheet.shape[0] > plain.shape[0] + 3 * TILE  # a strip more in each row
    there = (sheet == color_of(0)).all(axis=2)
    y, x = np.argwhere(there)[0]
    features = sheet[y + TILE + 4 : y + 2 * TILE + 4, x : x + TILE].astype(float)
    left, right = features[:, : TILE // 2].reshape(-1, 3), features[:, TILE // 2 :].reshape(-1, 3)
    assert abs(left.mean(0) - right.mean(0)).max() > 200 and max(left[:, 0].std(), right[:, 0].std()) < 40


def test_class_tokens_are_bars_of_one_color(tmp_path):
    draw = np.random.default_rng(0)
    rows, centers = np.ones((16, 12), np.int8), draw.normal(size=(4, 12)) * 5
    path = write_set(
        tmp_path / "set", teacher=lambda label: rows, class_token=lambda label: centers[label].astype(np.float16)
    )
    sheet = sheet_of(path, tmp_path, columns=2)
    colors = []
    for label in range(4):
        y, x = np.argwhere((sheet == color_of(label)).all(axis=2))[0]
        below = y + 2 * (TILE + 4)  # the picture, the rows, then the bar
        bars = [sheet[below : below + TILE // 4, left : left + TILE] for left in (x, x + TILE + 4)]
        assert all((bar == bars[0][0, 0]).all() for bar in bars)  # of the same class the same
        assert (sheet[below + TILE // 4 : below + TILE // 4 + 3, x : x + TILE] == 255).all()
        colors.append(tuple(bars[0][0, 0]))
    assert len(set(colors)) == 4


def test_principal_colors_are_those_of_an_svd(seed):
    rows = np.random.default_rng(seed).normal(size=(300, 9)) * np.array([9, 6, 3, 1, 1, 1, 1, 1, 1])
    centered = rows - rows.mean(0)
    axes = np.linalg.svd(centered, full_matrices=False)[2][:3]
    colors = principal_colors(rows).astype(float)
    for channel in range(3):
        assert abs(np.corrcoef(colors[:, channel], centered @ axes[channel])[0, 1]) > 0.97
    assert np.array_equal(principal_colors(rows), principal_colors(rows.copy()))
    assert principal_colors(np.ones((5, 2))).shape == (5, 3)  # nothing to see, no division by zero


def test_latents_stand_in_for_missing_images(tmp_path):
    def moments(label):
        array = np.zeros((8, 4, 4), np.float16)
        array[label % 4] = 1
        array[4:] = np.random.default_rng(label).normal(size=(4, 4, 4))  # deviations are not shown
        return array

    sheet = sheet_of(write_set(tmp_path / "set", moments=moments, images=False), tmp_path, columns=3)
    colors = {tuple(sheet[y, -20]) for y in range(60, sheet.shape[0] - 60)}
    assert len(colors) > 3


def test_damaged_members_leave_an_empty_frame(tmp_path):
    path = write_set(tmp_path / "set", teacher=lambda label: np.zeros((16 if label else 15, 12), np.int8))
    assert tiles(sheet_of(path, tmp_path, columns=2), color_of(0)) == 2
    (path / "shard-000000.tar").write_bytes(b"broken" * 500)
    assert 0 < tiles(sheet_of(path, tmp_path, columns=2), color_of(1)) <= 2
    (path / "shard-000001.tar").write_bytes(b"")
    with pytest.raises(RunError, match="no sample could be read.*data check"):
        show(path, tmp_path / "x.png")
    (path / "shard-000000.tar").unlink()
    with pytest.raises(RunError, match="data check"):
        show(path, tmp_path / "x.png")
