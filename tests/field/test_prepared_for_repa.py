"""ImageNet as it lies on the disks of REPA's and REG's users: pictures, labels and latents, none of it made again."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from maskalign.data import ShardStream
from maskalign.data.build import build, check
from maskalign.data.format.manifest import Manifest

SIDE = 16  # of the pictures; latents are 2 x 2


def prepare(root, labels, images="images", latents="vae-sd", count=None, seed=0):
    """The folders as the public preprocessing scripts write them; {picture: (pixels, label, moments)}."""
    draw, truth = np.random.default_rng(seed), {}
    tables = {images: [], latents: []}
    for number, label in enumerate(labels):
        index = f"{number:08d}"
        names = {images: f"{index[:5]}/img{index}.png", latents: f"{index[:5]}/img-mean-std-{index}.npy"}
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        moments = np.concatenate([draw.standard_normal((4, 2, 2)), draw.random((4, 2, 2))]).astype(np.float32)
        for folder, name in names.items():
            if folder == latents and count is not None and number >= count:
                continue
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if folder == images:
                Image.fromarray(pixels).save(path, format="png", compress_level=0, optimize=False)
            else:
                np.save(path, moments)
            tables[folder].append([name, label])
        truth[f"{images}/{names[images]}"] = pixels, label, moments
    for folder, table in tables.items():
        (root / folder / "dataset.json").write_text(json.dumps({"labels": table}))
    return truth


def stored(folder):
    """{key: {ending: bytes}} by tarfile alone."""
    samples = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, ending = info.name.partition(".")
                if not info.name.startswith("__"):
                    samples.setdefault(key, {})[ending] = tar.extractfile(info).read()
    return samples


@pytest.mark.parametrize("images", ["images", "imagenet_256-vae"])
def test_pictures_labels_and_latents_are_taken_over_as_they_are(images, command, tmp_path):
    truth = prepare(tmp_path / "data", [3, 0, 1, 2, 1, 0, 3], images)
    status, said, error = command("data", "build", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 0, error
    assert (
        "4 classes from the labels in dataset.json" in said
        and "default of REPA and REG, stabilityai/sd-vae-ft-mse" in said
    )
    manifest, samples = Manifest.load(tmp_path / "out"), stored(tmp_path / "out")
    assert manifest.resolution == SIDE and manifest.num_samples == len(samples) == 7
    vae = {"scale": 0.18215, "bias": 0.0, "dtype": "float32", "name": "stabilityai/sd-vae-ft-mse"}
    assert manifest.latent == vae | {"shape": [8, 2, 2]}
    files = {path.read_bytes() for path in (tmp_path / "data" / images).rglob("*.png")}
    assert {members["png"] for members in samples.values()} == files  # byte for byte
    by_pixels = {pixels.tobytes(): (label, moments) for pixels, label, moments in truth.values()}
    for members in samples.values():
        label, moments = by_pixels[np.asarray(Image.open(io.BytesIO(members["png"]))).tobytes()]
        assert int(members["cls"]) == label
        assert np.array_equal(np.load(io.BytesIO(members["moments.npy"])), moments)
    assert check(tmp_path / "out", quiet=True) == []
    batch = next(iter(ShardStream(tmp_path / "out", 7)))
    for image, label, moments in zip(batch["image"], batch["label"], batch["moments"], strict=True):
        expected = by_pixels[image.permute(1, 2, 0).contiguous().numpy().tobytes()]
        assert int(label) == expected[0] and np.array_equal(moments.numpy(), expected[1])


def test_an_encoding_that_was_stopped_half_way(tmp_path):
    truth = prepare(tmp_path / "data", [0, 1] * 4, count=6)
    os.unlink(tmp_path / "data" / "vae-sd" / "dataset.json")  # the script writes it last
    manifest = build(tmp_path / "data", tmp_path / "out", max_bad_fraction=0.3, workers=0, quiet=True)
    assert manifest.num_samples == 6
    lines = (tmp_path / "out" / "bad.csv").read_text().splitlines()[1:]
    assert lines == [f"{name},has no latents in vae-sd" for name in sorted(truth)[6:]]


def test_labels_beside_the_latents_alone(tmp_path):
    prepare(tmp_path / "data", [2, 0, 1])
    os.unlink(tmp_path / "data" / "images" / "dataset.json")  # REPA's own loader never reads it
    build(tmp_path / "data", tmp_path / "out", workers=0, quiet=True)
    assert sorted(int(members["cls"]) for members in stored(tmp_path / "out").values()) == [0, 1, 2]


def test_pictures_alone_may_have_any_size(tmp_path):
    prepare(tmp_path / "data", [0, 1])
    manifest = build(tmp_path / "data" / "images", tmp_path / "out", size=8, workers=0, quiet=True)
    assert manifest.resolution == 8 and manifest.latent is None


def damage_header(root):
    (root / "vae-sd" / "00000" / "img-mean-std-00000000.npy").write_bytes(b"\x93NUMPY")


def shift_labels(root):
    path = root / "vae-sd" / "dataset.json"
    table = json.loads(path.read_text())["labels"]
    shifted = [[name, table[number - 1][1]] for number, (name, _) in enumerate(table)]
    path.write_text(json.dumps({"labels": shifted}))


def lose_pictures(root):
    for path in sorted((root / "images").rglob("*.png"))[2:]:
        path.unlink()


def other_pictures(root):
    for path in (root / "images").rglob("*.png"):
        Image.new("RGB", (SIDE, SIDE + 2)).save(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (damage_header, "img-mean-std-00000000.npy cannot be read"),
        (shift_labels, "has another label in vae-sd/dataset.json than among the pictures"),
        (lose_pictures, "only 2 pictures; the latents do not belong to these pictures"),
        (other_pictures, "has 16 x 18 pixels, but latents of 2 x 2 belong to pictures of 16"),
    ],
)
def test_what_does_not_belong_together_is_one_line(change, words, command, tmp_path):
    prepare(tmp_path / "data", [0, 0, 1, 1])
    change(tmp_path / "data")
    status, _, error = command("data", "build", tmp_path / "data", "--out", tmp_path / "out")
    assert status == 2 and len(error) == 1 and words in error[0]
    assert not (tmp_path / "out").exists()


def test_another_size_is_one_line(command, tmp_path):
    prepare(tmp_path / "data", [0, 1])
    status, _, error = command("data", "build", tmp_path / "data", "--out", tmp_path / "out", "--size", 32)
    assert status == 2 and "its latents belong to pictures of 16 px, not 32; omit --size" in error[0]


def test_latents_that_are_damaged_cost_their_sample(tmp_path):
    prepare(tmp_path / "data", [0, 1, 0, 1])
    latents = tmp_path / "data" / "vae-sd" / "00000"
    np.save(latents / "img-mean-std-00000001.npy", np.full((8, 2, 2), np.nan, np.float32))
    np.save(latents / "img-mean-std-00000002.npy", np.zeros((8, 2, 3), np.float32))
    with open(latents / "img-mean-std-00000003.npy", "r+b") as file:
        file.truncate(150)
    manifest = build(tmp_path / "data", tmp_path / "out", max_bad_fraction=0.75, workers=0, quiet=True)
    assert manifest.num_samples == 1
    text = (tmp_path / "out" / "bad.csv").read_text()
    assert all(words in text for words in ("are not finite", "are (8, 2, 3) float32", "are not a plain .npy array"))


def test_killed_with_workers_it_goes_on_to_the_same_bytes(tmp_path):
    prepare(tmp_path / "data", [n % 5 for n in range(300)])
    build(tmp_path / "data", tmp_path / "want", shard_size=20, workers=0, quiet=True)
    words = ["data", "build", "data", "--out", "out", "--shard-size", "20", "--workers", "2"]
    deadline = time.monotonic() + 60
    process = subprocess.Popen([sys.executable, "-m", "maskalign", *words], cwd=tmp_path, start_new_session=True)
    while len(list((tmp_path / "out").glob("*.tar"))) < 3 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    build(tmp_path / "data", tmp_path / "out", shard_size=20, workers=0, quiet=True)
    assert stored(tmp_path / "out") == stored(tmp_path / "want")
    assert (tmp_path / "out" / "manifest.json").read_bytes() == (tmp_path / "want" / "manifest.json").read_bytes()
