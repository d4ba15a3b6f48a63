"""Encoding: right features, nothing else touched, and the same bytes however often it is killed."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from maskalign.data.build.encoding import IMAGENET_IMAGES, encode
from maskalign.data.build.features import mean_sample
from maskalign.data.build.recipe import entry_bytes
from maskalign.data.format.manifest import Manifest, teacher_member
from maskalign.data.format.tar_shards import read_shard, write_shard
from maskalign.errors import RunError, UsageError
from maskalign.teachers import load_teacher, load_teacher_like, quantize_rows
from tests.random_shards import RESNET, VIT, make_data_set


@pytest.fixture
def data(tmp_path):
    make_data_set(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def vit():
    return load_teacher(VIT, weights="random")


def read_all(folder):
    """{key: {ending: bytes}} of a data set, shard by shard in the manifest's order."""
    samples = {}
    for shard in Manifest.load(folder).shards:
        with open(os.path.join(folder, shard.name), "rb") as file:
            samples.update(read_shard(file))
    return samples


def digests(folder):
    return {
        name: hashlib.sha256(open(os.path.join(folder, name), "rb").read()).hexdigest() for name in os.listdir(folder)
    }


def picture(members):
    image = np.asarray(Image.open(io.BytesIO(members["png"])))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


def array(members, ending):
    return np.load(io.BytesIO(members[ending]), allow_pickle=False)


def quiet(data, **settings):
    return encode(data, **{"teacher": VIT, "weights": "random", "device": "cpu", "quiet": True} | settings)


def test_features_are_added_and_nothing_else_changes(data, vit):
    before = read_all(data)
    manifest = quiet(data)
    after = read_all(data)
    assert list(after) == list(before)
    for key, members in after.items():
        assert list(members) == ["cls", "png", "timm-test_vit.npy", "timm-test_vit.class.npy"]
        assert all(members[ending] == old for ending, old in before[key].items())
        q = array(members, "timm-test_vit.npy")
        want = quantize_rows(vit(picture(members)))[0].numpy()
        assert q.shape == (100, 64) and q.dtype == np.int8
        # Other batches may sum in another order: an entry at the edge of two steps may then go either way.
        assert np.abs(q.astype(int) - want).max() <= 1 and (q == want).mean() > 0.999
    assert manifest.to_json() == Manifest.load(data).to_json()
    entry = manifest.teachers[VIT]
    assert entry["tokens"] == 100 and entry["dim"] == 64 and entry["grid"] == [10, 10]
    assert entry["dtype"] == "int8" and entry["normalize"] == "none" and not manifest.hflip
    for shard in manifest.shards:
        file = (data / shard.name).read_bytes()
        assert len(file) == shard.bytes and hashlib.sha256(file).hexdigest() == shard.sha256
    assert sorted(os.listdir(data)) == ["manifest.json", *[shard.name for shard in manifest.shards]]


def test_shards_stay_readable_for_the_stream_check_and_webdataset(data):
    import webdataset

    from maskalign.data import ShardStream
    from maskalign.data.build import check

    quiet(data)
    check(data)
    batches = list(ShardStream(str(data), batch_size=4, epochs=1))
    assert {key for batch in batches for key in batch["key"]} == set(read_all(data))
    assert all(batch[VIT].shape[1:] == (100, 64) and batch[VIT].dtype == torch.int8 for batch in batches)
    shards = [str(path) for path in sorted(data.glob("*.tar"))]
    plain = list(webdataset.WebDataset(shards, shardshuffle=False).decode())
    assert len(plain) == 12 and plain[0]["timm-test_vit.npy"].shape == (100, 64)
    with tarfile.open(shards[0]) as tar:
        assert {member.mtime for member in tar} == {0}


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float16"},
        {"dtype": "int8", "normalize": "spatial", "grid": 4},
        {"dtype": "int8", "normalize": "mean"},
        {"dtype": "float16", "normalize": "mean", "grid": (16, 8)},
    ],
    ids=str,
)
def test_in_the_loop_is_what_is_cached(data, settings):
    manifest = quiet(data, **settings)
    entry = manifest.teachers[VIT]
    teacher = load_teacher_like(VIT, entry, weights="random", image_size=manifest.resolution)
    for members in read_all(data).values():
        cached = torch.from_numpy(array(members, "timm-test_vit.npy"))[None].double()
        live = teacher(picture(members)).double()
        if settings["dtype"] == "float16":
            assert torch.allclose(cached, live, rtol=1e-3, atol=2e-3 * float(live.abs().mean()))
        else:
            assert F.cosine_similarity(cached, live, dim=-1).min() > 0.9995


def test_the_mean_token_is_the_data_sets(data, vit):
    manifest = quiet(data, normalize="mean", dtype="float16")
    samples = read_all(data).values()
    want = torch.cat([vit(picture(members)) for members in samples]).double().mean(dim=(0, 1))
    mean = manifest.teachers[VIT]["mean"]
    assert np.allclose(mean, want, rtol=1e-5, atol=1e-6)
    assert all(np.float32(value) == np.float32(json.loads(json.dumps(value))) for value in mean)
    cached = np.stack([array(members, "timm-test_vit.npy") for members in samples]).astype(np.float64)
    assert np.abs(cached.mean(axis=(0, 1))).max() < 1e-3 * cached.std()


def test_the_mean_is_taken_from_all_over_a_large_data_set():
    class Fake:
        shards = [type("S", (), {"num_samples": 1000 if i % 10 else 0}) for i in range(100)]

    sample = mean_sample(Fake, images=64, shards=8)
    assert len(sample) == 8 and all(number % 10 for number in sample)
    assert min(sample) < 15 and max(sample) > 80
    assert sum(map(len, sample.values())) == 64
    assert all(max(positions) - min(positions) > 800 for positions in sample.values())


def test_mirrored_features_are_those_of_the_mirrored_image(data, vit):
    manifest = quiet(data, hflip=True, dtype="float16")
    assert manifest.hflip
    for members in read_all(data).values():
        plain = ["timm-test_vit.npy", "timm-test_vit.class.npy"]
        assert list(members)[-4:] == plain + [f"flip.{ending}" for ending in plain]
        want = vit(picture(members).flip(-1))[0].half().numpy()
        assert np.allclose(array(members, "flip.timm-test_vit.npy"), want, rtol=2e-3, atol=2e-3)
        assert not np.allclose(array(members, "timm-test_vit.npy"), want, rtol=0.05)


def test_several_teachers_at_once_and_one_after_the_other(data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    quiet(data, teacher=f"{VIT},{RESNET}", weights="random,random")
    quiet(tmp_path / "other", teacher=VIT)
    manifest = quiet(tmp_path / "other", teacher=RESNET)
    assert list(manifest.teachers) == [VIT, RESNET]
    assert read_all(data) == read_all(tmp_path / "other")


def test_encoding_the_same_again_does_nothing(data, capsys):
    quiet(data, normalize="mean")
    before = {name: os.stat(data / name).st_mtime_ns for name in os.listdir(data)}
    quiet(data, normalize="mean", quiet=False)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {name: os.stat(data / name).st_mtime_ns for name in os.listdir(data)}


def test_other_settings_replace(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "fresh")
    quiet(data, hflip=True)
    quiet(data, dtype="float16", quiet=False)
    assert "are replaced" in capsys.readouterr().out
    quiet(tmp_path / "fresh", dtype="float16")
    assert read_all(data) == read_all(tmp_path / "fresh")
    assert Manifest.load(data).teachers == Manifest.load(tmp_path / "fresh").teachers and not Manifest.load(data).hflip


def test_mirrored_and_not_do_not_mix(data, capsys):
    quiet(data)
    with pytest.raises(UsageError, match=f"hflip: {VIT} of .* in the same call"):
        quiet(data, teacher=RESNET, hflip=True)
    quiet(data, teacher=f"{VIT},{RESNET}", hflip=True)
    quiet(data, teacher="timm:test_vit2", quiet=False)  # and where mirrored ones are, new ones are mirrored too
    assert "stored mirrored too" in capsys.readouterr().out
    assert all(
        f"flip.{teacher_member(name)}.npy" in members
        for members in read_all(data).values()
        for name in [VIT, RESNET, "timm:test_vit2"]
    )


def test_to_another_folder(data, tmp_path):
    before = digests(data)
    shutil.copytree(data, tmp_path / "inside")
    quiet(data, out=tmp_path / "out")
    quiet(tmp_path / "inside")
    assert digests(data) == before
    assert digests(tmp_path / "out") == digests(tmp_path / "inside")
    quiet(data, out=tmp_path / "out")  # the same again: nothing to do
    make_data_set(tmp_path / "foreign", seed=1)
    with pytest.raises(UsageError, match="holds another data set"):
        quiet(data, out=tmp_path / "foreign")


def test_the_batch_size_is_a_matter_of_speed(data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    quiet(data, batch_size=1, dtype="float16")
    quiet(tmp_path / "other", batch_size=4, dtype="float16")
    other = read_all(tmp_path / "other")
    for key, members in read_all(data).items():
        a, b = (array(m, "timm-test_vit.npy").astype(np.float32) for m in (members, other[key]))
        assert np.allclose(a, b, rtol=2e-3, atol=2e-3)


def test_ranks_share_the_shards_and_write_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_data_set(tmp_path / name, counts=(3, 2, 4, 1, 2))
    # From a file: two threads that draw random weights at once would share torch's generator.
    torch.save(load_teacher(VIT, weights="random").encoder.network.state_dict(), tmp_path / "vit.pth")
    settings = {"weights": str(tmp_path / "vit.pth"), "normalize": "mean", "wait_seconds": 60}
    quiet(tmp_path / "one", **settings)
    results = []

    def second():
        results.append(quiet(tmp_path / "two", rank=1, world_size=2, **settings))

    thread = threading.Thread(target=second)
    thread.start()
    quiet(tmp_path / "two", rank=0, world_size=2, **settings)
    thread.join(60)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")
    assert results[0].to_json() == Manifest.load(tmp_path / "one").to_json()


def test_worker_processes_write_the_same_bytes(data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    quiet(data, normalize="mean")
    quiet(tmp_path / "other", normalize="mean", workers=2)
    assert digests(data) == digests(tmp_path / "other")


@pytest.mark.slow  # torchrun itself takes ten seconds; test_ranks_share_the_shards covers what it sets
@pytest.mark.distributed
def test_under_torchrun(data, tmp_path):
    shutil.copytree(data, tmp_path / "other")
    quiet(data, hflip=True)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "maskalign", "data", "encode", "--data", str(tmp_path / "other"), "--teacher", VIT]
    options = ["--weights", "random", "--device", "cpu", "--hflip"]
    done = subprocess.run(launch + command + options, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert digests(data) == digests(tmp_path / "other")
    assert done.stdout.count("images encoded in") == 1  # one of them speaks


def test_the_size_said_before_is_the_size_that_comes(data, tmp_path, capsys):
    from maskalign.data.build.encoding import estimate_bytes
    from maskalign.data.build.recipe import Recipe, Wanted

    old = Manifest.load(data)
    new = quiet(data, hflip=True, dry_run=True, quiet=False)
    said = capsys.readouterr().out
    assert new.to_json() == old.to_json() and sorted(os.listdir(data)) == sorted(
        ["manifest.json"] + [s.name for s in old.shards]
    )
    new = quiet(data, hflip=True)
    recipe = Recipe((Wanted(VIT, "random"),), None, "int8", None, "none", True, 8)
    estimate = estimate_bytes(old, recipe, None, new.teachers)
    assert f"{estimate // 12:,} bytes per image" in said
    assert abs(new.bytes - old.bytes - estimate) < 10240 * len(old.shards)  # tar fills up to its block


def test_imagenet_with_dinov2_b_takes_what_the_help_says():
    from maskalign.cli.data_encode import DataEncode

    for dtype, said in (("int8", 252), ("float16", 504)):
        entry = {"tokens": 256, "dim": 768, "dtype": dtype}
        numbers = 256 * 768 * (1 if dtype == "int8" else 2) * IMAGENET_IMAGES
        assert round(numbers / 1e9) == said
        assert 1 <= entry_bytes(entry) * IMAGENET_IMAGES / numbers < 1.01  # headers included
        assert f"{said} GB as {dtype}" in " ".join(DataEncode.__doc__.split())


CRASHES = textwrap.dedent(
    """
    import os, random, shutil, signal, sys, time
    import torch, timm  # once, for all children
    from maskalign.data.build import encoding as module
    from maskalign.data.build import encode
    from maskalign.data.format.manifest import Manifest
    from maskalign.data.format.tar_shards import read_shard
    import maskalign.teachers.teacher, maskalign.data.build.features

    folder, out, seed = sys.argv[1:]
    random.seed(int(seed))

    def work(target, die_at=None):
        if die_at is not None:
            # Die at the n-th change that the file system sees.
            count = 0
            for name in ("replace", "rename", "unlink", "rmdir"):
                def dying(*args, real=getattr(os, name), **kwargs):
                    nonlocal count
                    count += 1
                    if count == die_at:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)
                setattr(os, name, dying)
        settings = {"weights": "random", "normalize": "mean", "device": "cpu", "batch_size": 2, "quiet": True}
        encode(target, teacher="timm:test_vit", **settings)

    def child(*args):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                work(*args)
                status = 0
            finally:
                os._exit(status)
        return pid

    def readable(target):
        manifest = Manifest.load(target)
        keys = []
        for shard in manifest.shards:
            with open(os.path.join(target, shard.name), "rb") as file:
                samples = list(read_shard(file))
            assert all({"cls", "png"} <= set(members) for _, members in samples)
            for name in manifest.teachers:
                assert all("timm-test_vit.npy" in members for _, members in samples)
            keys += [key for key, _ in samples]
        assert len(keys) == len(set(keys)) == manifest.num_samples

    # At every single change, until a run gets through.
    for die_at in range(1, 200):
        target = os.path.join(out, f"at-{die_at}")
        shutil.copytree(folder, target)
        _, status = os.waitpid(child(target, die_at), 0)
        readable(target)
        if status == 0:
            break
        assert os.WIFSIGNALED(status)
        assert os.waitpid(child(target), 0)[1] == 0
        readable(target)
    assert 12 < die_at < 199, die_at

    # At random moments, as often as it takes.
    target = os.path.join(out, "random")
    shutil.copytree(folder, target)
    kills, patience = 0, 0.05
    while True:
        pid = child(target)
        deadline = time.monotonic() + random.uniform(0, patience)
        while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG)[0] == 0:
            time.sleep(0.005)
        else:
            if time.monotonic() < deadline:
                break
        try:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)[1] == 0
        except (ProcessLookupError, ChildProcessError):
            done = False
        kills, patience = kills + 1, patience * 1.3
        readable(target)
        if done:
            break
    assert os.waitpid(child(target), 0)[1] == 0
    print(f"{die_at - 1} deaths at changes, {kills} at random moments")
    """
)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, seed):
    make_data_set(tmp_path / "data", counts=(3, 2, 2))
    shutil.copytree(tmp_path / "data", tmp_path / "want")
    quiet(tmp_path / "want", normalize="mean", batch_size=2)
    (tmp_path / "crash.py").write_text(CRASHES)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "crash.py", "data", "out", str(seed)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    print(run.stdout)
    want = digests(tmp_path / "want")
    for result in (tmp_path / "out").iterdir():
        assert digests(result) == want, result.name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"teacher": None}, "nothing to encode"),
        ({"teacher": "dinov3"}, "no teacher is called 'dinov3'"),
        ({"dtype": "int4"}, "dtype is 'int4'; give int8 or float16"),
        ({"normalize": "l2"}, "normalize is 'l2'"),
        ({"grid": (0, 4)}, "grid is .0, 4."),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"weights": "missing.pth"}, "no weights file missing.pth"),
        ({"weights": "random,random"}, "1 teachers but 2 weights"),
    ],
)
def test_bad_settings_are_refused(data, settings, words):
    before = digests(data)
    with pytest.raises(UsageError, match=words) as caught:
        quiet(data, **settings)
    assert "\n" not in str(caught.value)
    assert digests(data) == before


def test_bad_places_are_refused(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        quiet(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--out"):
        quiet("http://127.0.0.1:9/data")
    make_data_set(tmp_path / "features", image_format=None)
    with pytest.raises(UsageError, match="no images to encode"):
        quiet(tmp_path / "features")


def flip_bit(path, position):
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def stop(data, monkeypatch, shards, **settings):
    """Encode until Ctrl-C comes after a number of shards."""
    import maskalign.data.build.encoding as module

    original, left = module._encode_shard, iter(range(shards))

    def encode_shard(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "_encode_shard", encode_shard)
        quiet(data, **settings)


def test_what_a_stopped_encoding_leaves(data, monkeypatch, capsys):
    before = sorted(os.listdir(data))
    stop(data, monkeypatch, 0, normalize="mean")
    assert sorted(os.listdir(data)) == before  # nothing was whole, so there is nothing to go on from
    (data / ".encode-0123456789ab").mkdir()  # of a process that was killed
    (data / ".encode-0123456789ab" / "statistics.json").write_text("{}")
    stop(data, monkeypatch, 1, dtype="float16")
    (left,) = [name for name in os.listdir(data) if name.startswith(".encode-")]
    assert left != ".encode-0123456789ab"
    quiet(data, quiet=False)
    assert f"{left} is left from an encoding with other settings" in capsys.readouterr().out
    quiet(data, dtype="float16")  # the shards are others by now: what was begun with the old ones is of no use
    assert sorted(os.listdir(data)) == before and Manifest.load(data).teachers[VIT]["dtype"] == "float16"


def test_damaged_shards_stop_it_and_are_named(tmp_path):
    def damaged(name):
        make_data_set(tmp_path / name)
        return tmp_path / name, tmp_path / name / "shard-000001.tar"

    folder, shard = damaged("label")
    flip_bit(shard, 512)  # the label of the first sample, which would otherwise get a good checksum
    with pytest.raises(RunError, match="shard-000001.tar does not have the checksum"):
        quiet(folder)
    folder, shard = damaged("image")
    with open(shard, "rb") as file:
        position = file.read().index(b"IDAT") + 6
    flip_bit(shard, position)
    with pytest.raises(RunError, match="shard-000001.tar"):
        quiet(folder)
    folder, shard = damaged("cut")
    os.truncate(shard, 3000)
    with pytest.raises(RunError, match="shard-000001.tar"):
        quiet(folder)
    folder, shard = damaged("gone")
    shard.unlink()
    with pytest.raises(RunError, match="shard-000001.tar: No such file"):
        quiet(folder)
    # What was encoded before stays: mended, it goes on.
    make_data_set(tmp_path / "mended")
    shutil.copy(tmp_path / "mended" / shard.name, shard)
    quiet(folder)
    quiet(tmp_path / "mended")
    assert digests(folder) == digests(tmp_path / "mended")


def test_images_that_are_not_as_the_manifest_says(tmp_path):
    manifest = make_data_set(tmp_path / "size")
    manifest.resolution = 32
    manifest.save(tmp_path / "size")
    with pytest.raises(RunError, match="00000000.png has 16x16 pixels, expected 32x32"):
        quiet(tmp_path / "size")
    folder = tmp_path / "lost"
    make_data_set(folder)
    samples = [(key, {"cls": members["cls"]}) for key, members in read_all(folder).items()][:5]
    shard = write_shard(folder / "shard-000000.tar", samples)
    old = Manifest.load(folder)
    old.shards[0] = shard
    old.save(folder)
    with pytest.raises(RunError, match="shard-000000.tar: sample 00000000 has no image"):
        quiet(folder)


def test_teachers_that_give_no_numbers_stop_it(data, tmp_path):
    import timm

    state = timm.create_model("test_vit").state_dict()
    state["norm.bias"] += float("nan")
    torch.save(state, tmp_path / "nan.pth")
    for dtype in ("int8", "float16"):
        with pytest.raises(RunError, match="teacher timm:test_vit: .*finite"):
            quiet(data, weights=str(tmp_path / "nan.pth"), dtype=dtype)


def test_a_full_disk_is_seen_before_it_is_full(data, monkeypatch):
    usage = shutil.disk_usage(data)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(RunError, match="the disk has 1 kB free"):
        quiet(data)


def test_a_data_set_that_changes_meanwhile_is_not_overwritten(data, monkeypatch):
    import maskalign.data.build.encoding as module

    real = module._encode_shard

    def meddled(job, maker, number, advance):
        real(job, maker, number, advance)
        manifest = Manifest.load(data)
        manifest.license = "changed"
        manifest.save(data)

    monkeypatch.setattr(module, "_encode_shard", meddled)
    with pytest.raises(RunError, match="was changed while it was being encoded"):
        quiet(data)


def test_the_same_encoding_runs_only_once_at_a_time(data, monkeypatch):
    import maskalign.data.build.encoding as module

    real, seen = module._encode_shard, []

    def nested(job, maker, number, advance):
        with pytest.raises(UsageError, match="in use by maskalign data encode .process"):
            quiet(data)
        seen.append(number)
        real(job, maker, number, advance)

    monkeypatch.setattr(module, "_encode_shard", nested)
    quiet(data)
    assert seen == [0, 1, 2]


def test_a_wrong_name_on_the_command_line_is_answered_at_once(data):
    command = [sys.executable, "-m", "maskalign", "data", "encode", "--data", str(data), "--teacher", "dinov2-x"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "dinov2-x" in run.stderr
    code = "import sys, maskalign.data.build.encoding; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_the_command_hands_every_option_on(monkeypatch):
    import maskalign.data.build.encoding as module
    from maskalign.cli import main

    seen = {}
    monkeypatch.setattr(module, "encode", lambda data, **settings: seen.update(settings, data=data))
    words = (
        "data encode --data d --teacher a,b --hflip --dtype float16 --normalize mean --grid 8 --batch-size 4 --dry_run"
    )
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 0
    given = {"data": "d", "teacher": "a,b", "hflip": True, "dtype": "float16", "normalize": "mean", "grid": 8}
    assert seen == given | {"batch_size": 4, "dry_run": True} | {
        "latents": None,
        "class_token": "both",
        "class_components": 64,
        "out": None,
        "weights": None,
        "workers": None,
        "device": "auto",
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_features_that_a_cpu_gives(data, tmp_path):
    shutil.copytree(data, tmp_path / "cpu")
    quiet(data, device="cuda", dtype="float16", hflip=True)
    quiet(tmp_path / "cpu", dtype="float16", hflip=True)
    other = read_all(tmp_path / "cpu")
    for key, members in read_all(data).items():
        plain = ("timm-test_vit.npy", "timm-test_vit.class.npy")
        for ending in (*plain, *(f"flip.{ending}" for ending in plain)):
            a, b = (torch.from_numpy(array(m, ending)).double() for m in (members, other[key]))
            assert F.cosine_similarity(a, b, dim=-1).min() > 0.9995
