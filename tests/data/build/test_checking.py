"""data check: each kind of damage is found and named, and no damage makes it crash."""

import hashlib
import io
import json
import pickle
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskalign.data.build import check
from maskalign.data.format.manifest import Manifest
from maskalign.data.format.tar_shards import write_shard
from maskalign.errors import UsageError

GRID, DIM, SIDE = (2, 2), 6, 8


def npy(array, **how):
    buffer = io.BytesIO()
    np.save(buffer, array, **how)
    return buffer.getvalue()


def png(side=SIDE):
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (9, 99, 199)).save(buffer, format="PNG")
    return buffer.getvalue()


def members(label):
    return {
        "cls": str(label).encode(),
        "png": png(),
        "moments.npy": npy(np.zeros((8, 3, 3), np.float16)),
        "flip.moments.npy": npy(np.zeros((8, 3, 3), np.float16)),
        "tiny-net.npy": npy(np.zeros((4, DIM), np.int8)),
        "flip.tiny-net.npy": npy(np.zeros((4, DIM), np.int8)),
    }


@pytest.fixture
def data_set(tmp_path):
    """Writes a data set of 3 shards with 4 samples each, with `change(shard, samples)` applied to the samples."""

    def write(change=lambda shard, samples: samples):
        shards = []
        for number in range(3):
            samples = [(f"{4 * number + i:08d}", members(i % 3)) for i in range(4)]
            shards.append(write_shard(tmp_path / f"shard-{number:06d}.tar", change(number, samples)))
        entry = {"tokens": 4, "dim": DIM, "grid": list(GRID), "dtype": "int8", "normalize": "none"}
        latent = {"scale": 0.18215, "bias": 0.0, "shape": [8, 3, 3], "dtype": "float16", "name": "vae"}
        total = sum(shard.num_samples for shard in shards)
        manifest = Manifest(
            total, SIDE, ["a", "b", "c"], shards, latent=latent, teachers={"tiny.net": entry}, hflip=True
        )
        manifest.save(tmp_path)
        return tmp_path

    return write


def spoil(**changes):
    """A change of the second sample of shard 1: members to replace, or to remove where None."""

    def change(shard, samples):
        if shard == 1:
            for name, data in changes.items():
                samples[1][1].pop(name) if data is None else samples[1][1].update({name: data})
        return samples

    return change


def reasons(path, **how):
    return [str(problem) for problem in check(path, quiet=True, **how)]


def test_a_good_data_set(data_set):
    for workers in (0, 2):
        assert check(data_set(), workers=workers, decode=True, quiet=True) == []


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"cls": None}, "has no label"),
        ({"cls": b"3"}, r"label b'3' is not in [0, 3)"),
        ({"cls": b"-1"}, "label"),
        ({"cls": b"cat"}, "label"),
        ({"cls": b""}, "label"),
        ({"cls": b"9" * 5000}, "label"),
        ({"png": None}, "has no image (.png)"),
        ({"png": png(9)}, "its image is 9x9, the manifest says 8x8"),
        ({"png": b"not an image"}, "image cannot be decoded"),
        ({"moments.npy": None}, "has no moments.npy"),
        ({"flip.moments.npy": None}, "has no flip.moments.npy"),
        ({"tiny-net.npy": npy(np.zeros((5, DIM), np.int8))}, "tiny-net.npy has shape (5, 6)"),
        ({"tiny-net.npy": npy(np.zeros((4, DIM), np.float16))}, "dtype float16, the manifest says (4, 6) and int8"),
        ({"tiny-net.npy": npy(np.zeros((4, DIM), np.int8))[:-1]}, "its size differs from that in its header"),
        ({"tiny-net.npy": npy(np.asfortranarray(np.zeros((4, DIM), np.int8)))}, "column-major"),
        ({"tiny-net.npy": npy(np.array([{}], dtype=object), allow_pickle=True)}, "not numbers"),
        ({"tiny-net.npy": pickle.dumps(print)}, "not a plain .npy"),
        ({"tiny-net.npy": b""}, "not a plain .npy"),
    ],
)
def test_a_bad_sample_is_named(data_set, changes, reason):
    (found,) = reasons(data_set(spoil(**changes)))
    assert found.startswith("shard-000001.tar: sample 00000005: ") and reason in found


def test_only_decoding_finds_an_image_that_is_cut_after_its_header(data_set):
    path = data_set(spoil(png=png()[:50]))
    assert reasons(path) == []
    (found,) = reasons(path, decode=True)
    assert "00000005: its image cannot be decoded" in found


def test_damage_to_the_files(data_set):
    path = data_set()
    first, second, third = (path / f"shard-{number:06d}.tar" for number in range(3))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-512])
    data = bytearray(third.read_bytes())
    data[600] ^= 1
    third.write_bytes(data)
    found = reasons(path)
    assert found[0] == "shard-000000.tar: is missing"
    assert found[1].startswith("shard-000001.tar: has 39,424 bytes, the manifest says") or "bytes" in found[1]
    assert found[2].startswith("shard-000002.tar: its checksum is not the manifest's")
    assert found == reasons(path, workers=2)


def edit(path, **shard_changes):
    """Change the manifest's entry of shard 1 (and the total) without touching the shard."""
    manifest = Manifest.load(path)
    manifest.shards[1] = replace(manifest.shards[1], **shard_changes)
    manifest.num_samples = sum(shard.num_samples for shard in manifest.shards)
    manifest.save(path)


def test_a_wrong_count(data_set):
    path = data_set()
    edit(path, num_samples=5)
    assert reasons(path) == ["shard-000001.tar: holds 4 samples, the manifest says 5"]


def test_a_file_that_is_no_tar(data_set):
    path = data_set()
    data = b"hello" * 300
    (path / "shard-000001.tar").write_bytes(data)
    edit(path, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    assert any("not a readable tar" in reason for reason in reasons(path))
    (path / "shard-000001.tar").write_bytes(b"")
    edit(path, bytes=0, sha256=hashlib.sha256().hexdigest())
    assert len(reasons(path)) >= 1


def test_keys_that_occur_twice(data_set):
    def same_shard(shard, samples):
        return [samples[0], samples[1], samples[0], samples[3]] if shard == 1 else samples

    assert any("00000004: its key occurs twice" in reason for reason in reasons(data_set(same_shard)))

    def other_shard(shard, samples):
        return [("00000000", samples[0][1]), *samples[1:]] if shard == 2 else samples

    assert reasons(data_set(other_shard)) == ["shard-000002.tar: 1 keys are in shard-000000.tar as well"]


def test_a_shard_full_of_bad_samples_does_not_fill_the_screen(data_set):
    def change(shard, samples):
        return [(f"{i:08d}", {"cls": b"77"}) for i in range(100)] if shard == 0 else samples[3:]

    found = reasons(data_set(change))
    assert len(found) <= 25 and any("more bad samples" in reason for reason in found)


def test_any_flipped_byte_is_found(data_set, seed):
    draw = random.Random(seed)
    path = data_set()
    shard = path / "shard-000001.tar"
    good = shard.read_bytes()
    for _ in range(150):
        data = bytearray(good)
        kind = draw.choice(["flip", "cut", "double"])
        place = draw.randrange(len(data))
        if kind == "flip":
            data[place] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            data = data[:place]
        else:
            data = data[:place] + data[place // 2 :]
        shard.write_bytes(data)
        found = check(path, workers=0, quiet=True)
        assert found and {problem.shard for problem in found} == {"shard-000001.tar"}


def test_damage_with_a_fitting_checksum_never_crashes(data_set, seed):
    draw = random.Random(seed)
    path = data_set()
    shard = path / "shard-000001.tar"
    good = shard.read_bytes()
    noticed = 0
    for _ in range(150):
        data = bytearray(good)
        for _ in range(draw.randint(1, 20)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        shard.write_bytes(data)
        edit(path, sha256=hashlib.sha256(data).hexdigest())
        noticed += bool(check(path, workers=0, quiet=True))
    assert noticed > 30  # most bytes are padding and pixels


def test_the_command_lists_and_exits_with_1(data_set):
    path = data_set(spoil(cls=b"7"))
    command = [sys.executable, "-m", "maskalign", "data", "check", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout.strip() == "shard-000001.tar: sample 00000005: its label b'7' is not in [0, 3)"
    assert "1 of 3 shards" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    data_set()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "all 3 shards are good, 12 samples" in done.stdout
    (path / "manifest.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "no manifest.json" in done.stderr


def test_over_fsspec(data_set):
    import fsspec

    path = data_set()
    for file in path.iterdir():
        fsspec.filesystem("memory").pipe_file(f"/checked/{file.name}", file.read_bytes())
    assert check("memory://checked", workers=0, quiet=True) == []
    fsspec.filesystem("memory").rm_file("/checked/shard-000002.tar")
    assert reasons("memory://checked", workers=0) == ["shard-000002.tar: is missing"]


def test_a_manifest_that_leads_elsewhere_is_refused(data_set):
    path = data_set()
    data = json.loads((path / "manifest.json").read_text())
    data["shards"][0]["name"] = "../other.tar"
    (path / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="plain file name"):
        check(path)
