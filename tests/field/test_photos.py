"""Photos that are stored turned, large numbers in small ranges, and folders walked alike for building and measuring."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from maskalign.data.build.images import BadImage, decode_image
from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureFolder

# Where the upper left quarter of the scene is stored, for each of EXIF's orientations (1 is as it is seen).
CORNER = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (-1, 0), 7: (-1, -1), 8: (0, -1)}


def photo(orientation, how="JPEG", width=32, height=16):
    """A file whose scene is white with a red upper left quarter, `width` x `height`, stored as a camera would."""
    wide, high = (height, width) if orientation >= 5 else (width, height)
    pixels = np.full((high, wide, 3), 255, dtype=np.uint8)
    row, column = CORNER[orientation]
    rows = slice(high // 2, None) if row else slice(0, high // 2)
    columns = slice(wide // 2, None) if column else slice(0, wide // 2)
    pixels[rows, columns] = (255, 0, 0)
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if how == "JPEG" else {"lossless": True} if how == "WEBP" else {}
    Image.fromarray(pixels).save(buffer, how, exif=exif, **options)
    return buffer.getvalue()


def is_upright(image):
    pixels = np.asarray(image).astype(int)
    height, width, _ = pixels.shape
    red = (np.abs(pixels - [255, 0, 0]).max(axis=2) < 60).astype(float)
    quarter = np.zeros((height, width))
    quarter[: height // 2, : width // 2] = 1
    return np.abs(red - quarter).mean() < 0.05


@pytest.mark.parametrize("how", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_are_turned_as_their_camera_says(orientation, how):
    data = photo(orientation, how)
    turned = decode_image(data, exif="apply")
    assert turned.size == (32, 16) and is_upright(turned)
    stored = decode_image(data, exif="ignore")
    assert stored.size == ((16, 32) if orientation >= 5 else (32, 16))
    assert is_upright(stored) == (orientation in (1, 5))


def test_exif_that_is_damaged_says_nothing():
    data = photo(6)
    place = data.index(b"Exif\0\0")
    for number in range(6, 30):
        broken = bytearray(data)
        broken[place + number : place + number + 4] = b"\xff\xff\xff\xff"
        assert decode_image(bytes(broken), exif="apply").size in ((32, 16), (16, 32))


def test_a_built_data_set_says_what_was_done(on_disk, build, tmp_path):
    source = on_disk.folder("set", {"cat/1.jpg": photo(8, width=16)})
    for how in ("apply", "ignore"):
        options = [] if how == "apply" else ["--exif", how]
        _, manifest, _, _ = build(source, *options, out=how)
        assert manifest.extra["exif"] == how
        with tarfile.open(tmp_path / how / "shard-000000.tar") as tar:
            image = Image.open(io.BytesIO(tar.extractfile("00000000.png").read()))
        assert is_upright(image) == (how == "apply")
    status, _, _, error = build(source, "--exif", "ignore", out="apply")
    assert status == 2 and "exif 'apply' (now 'ignore')" in error


def test_an_older_data_set_counts_as_one_with_exif_ignored(on_disk, build, tmp_path):
    """Its plan says nothing about EXIF, and its fingerprint is of the settings without it."""
    import json

    source = on_disk.folder("set", {"cat/1.png": on_disk.png()})
    build(source, "--exif", "ignore")
    path = tmp_path / "out" / "manifest.json"
    old = json.loads(path.read_text())
    del old["exif"], old["build"]["settings"]["exif"]
    path.write_text(json.dumps(old))
    assert "complete already" in build(source, "--exif", "ignore")[2]
    status, _, _, error = build(source)
    assert status == 2 and "exif 'ignore' (now 'apply')" in error


def gray(values, how="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values)).save(buffer, how)
    return buffer.getvalue()


def ramp(most, dtype=np.uint16):
    return np.linspace(0, most, 256).reshape(16, 16).round().astype(dtype)


@pytest.mark.parametrize("how", ["PNG", "TIFF"])
@pytest.mark.parametrize("most", [65535, 40000, 16384, 4095, 2048])
def test_large_numbers_whose_bits_can_be_told(most, how):
    pixels = np.asarray(decode_image(gray(ramp(most), how)))[..., 0].astype(int)
    full = 65535 if most > 4095 else 4095
    assert np.abs(pixels - ramp(most) * 255.0 / full).max() <= 1.5


@pytest.mark.parametrize("how", ["PNG", "TIFF"])
@pytest.mark.parametrize("most", [16383, 9000, 4096, 2047, 1023, 255, 1])
def test_large_numbers_whose_bits_cannot_be_told(most, how):
    with pytest.raises(BadImage, match=f"16-bit pixels up to {most:,} of 65,535.*convert it to 8 bits"):
        decode_image(gray(ramp(most), how))


def test_black_is_black_in_any_range():
    assert np.asarray(decode_image(gray(np.zeros((4, 4), np.uint16)))).max() == 0


@pytest.mark.parametrize(
    "values, match",
    [
        (np.full((4, 4), 70_000, np.int32), "outside the range of 16 bits"),
        (np.full((4, 4), -5, np.int32), "outside the range of 16 bits"),
        (np.full((4, 4), 0.5, np.float32), "floating-point pixels"),
    ],
)
def test_numbers_that_are_no_brightness(values, match):
    with pytest.raises(BadImage, match=match):
        decode_image(gray(values, "TIFF"))


def deep_png(values):
    """A 16-bit PNG of color, (height, width, 3 or 4) uint16, which Pillow cannot write."""
    import struct
    import zlib

    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [3, 4])
def test_colors_of_16_bits(channels):
    values = np.repeat(ramp(60_000)[..., None], channels, axis=2)
    if channels == 4:
        values[..., 3] = 65535
    pixels = np.asarray(decode_image(deep_png(values)))
    assert np.abs(pixels.astype(int) - (values[..., :3] >> 8)).max() <= 1
    for most in (4095, 16383, 255):
        dark = np.repeat(ramp(most)[..., None], channels, axis=2)
        if channels == 4:
            dark[..., 3] = 65535
        with pytest.raises(BadImage, match="16-bit pixels up to"):
            decode_image(deep_png(dark))


@pytest.mark.parametrize("kind", ["P5", "P6"])
def test_pgm_and_ppm_name_their_largest_number(kind):
    channels = 1 if kind == "P5" else 3
    values = np.repeat(ramp(1000)[..., None], channels, axis=2)
    data = f"{kind}\n16 16\n1000\n".encode() + values.astype(">u2").tobytes()
    pixels = np.asarray(decode_image(data)).astype(int)
    assert np.abs(pixels - values * 255.0 / 1000).max() <= 1.5


def test_pictures_of_untold_range_are_listed_not_blackened(on_disk, build, tmp_path):
    files = {f"cat/{n}.png": on_disk.png((20 * n, 9, 9)) for n in range(5)} | {"cat/dark.png": gray(ramp(900))}
    build(on_disk.folder("set", files), "--max_bad_fraction", 0.5)
    assert "16-bit pixels up to 900" in on_disk.bad(tmp_path / "out")["cat/dark.png"]


def picture_tree(on_disk, tmp_path):
    """8 pictures, among what must not count as one."""
    files = {f"a/{n}.png": on_disk.png() for n in range(4)} | {f"b/c/{n}.PNG": on_disk.png() for n in range(4)}
    files |= {f".cache/{n}.png": on_disk.png() for n in range(9)} | {".hidden.png": on_disk.png()}
    files |= {"__MACOSX/a/0.png": b"x", "a/._0.png": b"x", "a/notes.txt": b"x", "a/x.heic": b"x", "a/.b/0.png": b"x"}
    root = on_disk.folder("tree", files)
    (root / "a" / "loop").symlink_to(root)
    (root / "b" / "self").symlink_to(root / "b")
    (root / "z").symlink_to(root / "a")
    return root


def test_hidden_folders_and_loops_count_neither_for_building_nor_for_measuring(on_disk, build, tmp_path):
    root = picture_tree(on_disk, tmp_path)
    folder = PictureFolder(root)
    assert folder.count == 8 and folder.passed == {".txt": 1, ".heic": 1, "hidden": 3}
    assert sum(len(batch) for batch in folder.batches(3)) == 8
    _, manifest, said, _ = build(root)
    assert manifest.num_samples == 8 and "hidden 3, .heic 1, .txt 1" in said


def test_links_never_take_the_name_of_what_they_lead_to(on_disk, build, tmp_path):
    """Whatever the order on disk: `aaa` links to the folder `zoo`, and the class is zoo."""
    root = on_disk.folder("set", {"zoo/1.png": on_disk.png(), "cat/1.png": on_disk.png()})
    (root / "aaa").symlink_to(root / "zoo")
    (root / "cat" / "2.png").symlink_to(root / "zoo" / "1.png")
    _, manifest, _, _ = build(root)
    assert manifest.class_names == ["cat", "zoo"] and manifest.num_samples == 3


def test_what_is_no_file_is_listed_by_build_and_named_by_evaluate(on_disk, build, tmp_path):
    root = on_disk.folder("set", {"cat/1.png": on_disk.png()})
    (root / "cat" / "2.png").symlink_to(root / "missing.png")
    os.mkfifo(root / "cat" / "3.png")
    (root / "cat" / "4.png").symlink_to("4.png")
    build(root, "--max_bad_fraction", 0.9)
    bad = on_disk.bad(tmp_path / "out")
    assert bad["cat/2.png"] == "a link that leads nowhere" and bad["cat/3.png"] == "not a regular file"
    assert sorted(bad) == ["cat/2.png", "cat/3.png", "cat/4.png"]
    with pytest.raises(UsageError, match="2.png: a link that leads nowhere; remove or replace it"):
        PictureFolder(root)


def test_a_folder_of_other_pictures_says_so(on_disk, command, tmp_path):
    root = on_disk.folder("phone", {"1.heic": b"x", "2.HEIC": b"x", "3.jfif": b"x"})
    with pytest.raises(UsageError, match=r"no pictures \(but .heic 2, .jfif 1\)"):
        PictureFolder(root)
