"""The stream's promises: once per epoch, the same batches for all, resumption anywhere."""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import torch

from maskalign.data import ShardStream, merge_states
from maskalign.data.stream.opening import Opener
from maskalign.errors import UsageError


def ranks(path, batch_size, world_size, **options):
    return [ShardStream(path, batch_size, rank=r, world_size=world_size, **options) for r in range(world_size)]


def steps(streams, most=None):
    """Per step: the keys of the global batch in the order of its slots."""
    result = []
    iterators = [iter(stream) for stream in streams]
    while most is None or len(result) < most:
        parts = [next(iterator, None) for iterator in iterators]
        if any(part is None for part in parts):
            assert all(part is None for part in parts), "ranks yield different numbers of batches"
            break
        keys = []
        for part in parts:
            assert part["slot"] == len(keys), "a rank's samples are contiguous slots of the global batch"
            keys += part["key"]
        result.append(keys)
    for iterator in iterators:
        iterator.close()
    return result


def assert_once_each(keys, truth, times=1):
    counts = Counter(keys)
    assert set(counts) == set(truth)
    assert set(counts.values()) == {times}


@pytest.mark.parametrize("kind", ["png", "webp", None])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_what_webdataset_reads(make_shards, kind, workers):
    import webdataset

    path, truth = make_shards([5, 9, 1, 6], image=kind, latent=True)
    urls = [os.path.join(path, f"shard-{i:06d}.tar") for i in range(4)]
    read = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False).decode()}
    seen = []
    for batch in ShardStream(path, 4, num_workers=workers, epochs=1):
        b = len(batch["key"])
        assert batch["label"].dtype == torch.int64 and batch["label"].shape == (b,)
        assert batch["moments"].dtype == torch.float16 and batch["moments"].shape == (b, 8, 2, 2)
        assert batch["lite:2"].dtype == torch.int8 and batch["lite:2"].shape == (b, 4, 6)
        assert ("image" in batch) == (kind is not None)
        for i, key in enumerate(batch["key"]):
            assert batch["label"][i] == truth[key]["label"] == read[key]["cls"]
            assert np.array_equal(batch["moments"][i], read[key]["moments.npy"])
            assert np.array_equal(batch["lite:2"][i], read[key]["lite-2.npy"])
            assert np.array_equal(batch["lite:2"][i], truth[key]["lite:2"])
            if kind is not None:
                assert batch["image"].dtype == torch.uint8
                assert np.array_equal(batch["image"][i].permute(1, 2, 0), truth[key]["image"])
        seen += batch["key"]
    assert_once_each(seen, truth)
    assert sorted(seen) == sorted(read)


def test_jpeg_and_only_the_fields_asked_for(make_shards):
    path, truth = make_shards([6], image="jpg")
    batch = next(iter(ShardStream(path, 6)))
    for i, key in enumerate(batch["key"]):  # lossy, so close to the truth only
        assert np.abs(batch["image"][i].permute(1, 2, 0).numpy().astype(int) - truth[key]["image"]).mean() < 8
    assert set(next(iter(ShardStream(path, 6, fields=["lite:2"])))) == {
        "key", "epoch", "slot", "bad", "label", "lite:2",
    }  # fmt: skip
    with pytest.raises(UsageError, match="no 'moments'.*image, lite:2"):
        ShardStream(path, 6, fields=["moments"])


@pytest.mark.parametrize("counts", [[23], [7, 13, 0, 20, 1, 9], [1, 1, 1], [40] * 5])
@pytest.mark.parametrize("batch_size", [4, 12, 32])
def test_each_sample_once_per_epoch_on_any_number_of_ranks(make_shards, counts, batch_size):
    path, truth = make_shards(counts)
    alone = steps(ranks(path, batch_size, 1, epochs=3))
    assert [len(keys) for keys in alone[:-1]] == [batch_size] * (len(alone) - 1)
    flat = [key for keys in alone for key in keys]
    for world_size in (2, 4):
        assert steps(ranks(path, batch_size, world_size, epochs=3)) == alone
    per_epoch = Counter()
    for batch in ShardStream(path, batch_size, epochs=3):
        per_epoch.update(zip(batch["epoch"].tolist(), batch["key"], strict=True))
    assert per_epoch == Counter((epoch, key) for epoch in range(3) for key in truth)
    # A batch that spans two epochs is in stream order inside, so epochs are told apart by whole batches here.
    assert_once_each(flat, truth, 3)
    whole = len(truth) // batch_size * batch_size
    assert len(set(flat[:whole])) == whole, "nothing comes twice before the epoch ends"


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_do_not_change_the_batches(make_shards, workers):
    path, _ = make_shards([7, 13, 0, 20, 1, 9])
    alone = steps(ranks(path, 12, 1, epochs=2))
    assert steps(ranks(path, 12, 1, epochs=2, num_workers=workers)) == alone
    assert steps(ranks(path, 12, 2, epochs=2, num_workers=workers)) == alone


@pytest.mark.parametrize("streams", [1, 2, 6])
def test_ranks_may_share_a_logical_stream(make_shards, streams):
    path, truth = make_shards([7, 13, 0, 20, 1, 9])
    alone = steps(ranks(path, 12, 1, epochs=2, streams=streams))
    assert steps(ranks(path, 12, 4, epochs=2, streams=streams)) == alone
    assert steps(ranks(path, 12, 12, epochs=2, streams=streams)) == alone
    assert_once_each(sum(alone, []), truth, 2)


def test_orders_differ_by_epoch_and_seed_and_mix_shards(make_shards):
    path, truth = make_shards([32] * 8)
    first, second = (sum(steps(ranks(path, 16, 1, epochs=1, seed=seed)), []) for seed in (0, 1))
    both = sum(steps(ranks(path, 16, 1, epochs=2)), [])
    assert both[:256] == first and both[256:] != first and second != first
    assert len({truth[key]["shard"] for key in first[:16]}) > 3
    labels = [int(key) for key in first]
    assert abs(np.corrcoef(labels, range(256))[0, 1]) < 0.25


def test_resumes_anywhere_on_other_ranks_and_workers(make_shards, seed):
    draw = random.Random(seed)
    path, truth = make_shards([7, 13, 0, 20, 1, 9])
    undisturbed = steps(ranks(path, 8, 1, epochs=4))
    for _ in range(4):
        done, state = [], None
        while len(done) < len(undisturbed):
            streams = ranks(path, 8, draw.choice([1, 2, 4, 8]), epochs=4, num_workers=draw.choice([0, 0, 0, 2]))
            if state is not None:
                for stream in streams:
                    stream.load_state_dict(state)
            done += steps(streams, most=draw.randint(0, 9))
            state = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
        assert done == undisturbed
    assert_once_each(sum(undisturbed, []), truth, 4)


def test_state_is_the_position_after_the_last_batch_taken(make_shards):
    path, _ = make_shards([20, 20])
    for workers in (0, 2):  # workers read ahead; that must not count
        stream = ShardStream(path, 4, num_workers=workers, prefetch=6)
        batches = iter(stream)
        assert stream.state_dict() == ShardStream(path, 4).state_dict()
        seen = [next(batches)["key"] for _ in range(3)]
        state = stream.state_dict()
        after = [next(batches)["key"] for _ in range(3)]
        again = ShardStream(path, 4)
        again.load_state_dict(state)
        assert [batch["key"] for _, batch in zip(range(3), again, strict=False)] == after
        stream.load_state_dict(ShardStream(path, 4).state_dict())  # back to the start, while an iterator is open
        assert [batch["key"] for _, batch in zip(range(3), stream, strict=False)] == seen
        with pytest.raises(UsageError, match="iterator has ended"):
            next(batches)


def test_iterating_again_goes_on(make_shards):
    path, truth = make_shards([20, 21])
    stream, seen = ShardStream(path, 4, epochs=1), []
    while len(seen) < len(truth):
        for batch in stream:
            seen += batch["key"]
            if len(seen) % 3 == 0:
                break
    assert_once_each(seen, truth)
    assert list(stream) == []


def test_batches_that_are_kept_are_not_overwritten(make_shards):
    path, truth = make_shards([30, 30])
    for workers in (0, 2):
        for batch in list(ShardStream(path, 8, num_workers=workers, epochs=1)):
            for i, key in enumerate(batch["key"]):
                assert np.array_equal(batch["lite:2"][i], truth[key]["lite:2"])


def test_memory_of_dropped_batches_is_used_again(make_shards):
    path, _ = make_shards([30, 30])
    for workers in (0, 2):
        places = set()
        for _, batch in zip(range(40), ShardStream(path, 8, num_workers=workers), strict=False):
            places.add(batch["image"].data_ptr())
        assert len(places) <= 8


def test_resuming_opens_no_finished_shard(make_shards, monkeypatch):
    path, truth = make_shards([4] * 24)
    stream = ShardStream(path, 8, streams=4, group=2, epochs=1)
    seen = [batch["key"] for _, batch in zip(range(7), stream, strict=False)]
    left = Counter(entry["shard"] for entry in truth.values())
    left.subtract(truth[key]["shard"] for keys in seen for key in keys)
    finished = {shard for shard, count in left.items() if count == 0}
    assert finished
    for shard in finished:
        os.remove(os.path.join(path, f"shard-{shard:06d}.tar"))
    opened = []
    plain = Opener.open
    monkeypatch.setattr(Opener, "open", lambda self, shard: (opened.append(shard.name), plain(self, shard))[1])
    again = ShardStream(path, 8, epochs=1)
    again.load_state_dict(stream.state_dict())
    rest = [batch["key"] for batch in again]
    assert_once_each(sum(seen + rest, []), truth)
    assert not again.bad_samples
    assert not {f"shard-{shard:06d}.tar" for shard in finished} & set(opened)


def test_state_of_100_000_shards_is_small_and_quick(make_shards, monkeypatch):
    path, _ = make_shards([2])
    manifest = json.loads(open(os.path.join(path, "manifest.json")).read())
    entry = manifest["shards"][0]
    manifest["shards"] = [entry | {"name": f"shard-{i:06d}.tar"} for i in range(100_000)]
    manifest["num_samples"] = 200_000
    one = os.path.join(path, "shard-000000.tar")  # stands for all of them
    monkeypatch.setattr(Opener, "open", lambda self, shard: os.open(one, os.O_RDONLY))
    with open(os.path.join(path, "manifest.json"), "w") as file:
        json.dump(manifest, file)
    stream = ShardStream(path, 256, epochs=1)
    for _, batch in zip(range(20), stream, strict=False):
        assert len(batch["key"]) == 256
    text = json.dumps(stream.state_dict())
    assert len(text) < 20_000
    start = time.perf_counter()
    stream.load_state_dict(json.loads(text))
    next(iter(stream))
    assert time.perf_counter() - start < 10


def test_mirrored_variants(make_shards):
    path, truth = make_shards([20, 20], latent=True, hflip=True)
    drawn = {}
    for workers, world_size in ((0, 1), (2, 1), (0, 2)):
        for stream in ranks(path, 8, world_size, epochs=2, num_workers=workers):
            for batch in stream:
                for i, (key, epoch) in enumerate(zip(batch["key"], batch["epoch"].tolist(), strict=True)):
                    entry, image = truth[key], batch["image"][i].permute(1, 2, 0).numpy()
                    flipped = np.array_equal(batch["lite:2"][i], entry["flip lite:2"])
                    assert np.array_equal(batch["lite:2"][i], entry["flip lite:2" if flipped else "lite:2"])
                    assert np.array_equal(batch["moments"][i], entry["flip moments" if flipped else "moments"])
                    assert np.array_equal(image, entry["image"][:, ::-1] if flipped else entry["image"])
                    assert drawn.setdefault((epoch, key), flipped) == flipped
    assert 20 < sum(drawn.values()) < 60
    assert any(drawn[0, key] != drawn[1, key] for key in truth)
    for batch in ShardStream(path, 8, epochs=1, hflip=False):
        for i, key in enumerate(batch["key"]):
            assert np.array_equal(batch["lite:2"][i], truth[key]["lite:2"])


def test_mixture_keeps_its_shares(make_shards):
    one, first = make_shards([30, 30], name="one")
    two, second = make_shards([50], name="two", first=1000)
    three, third = make_shards([9, 9], name="three", first=2000)
    weights = {one: 0.5, two: 0.3, three: 0.2}
    streams = [ShardStream(weights, 10, epochs=3)]
    alone = steps(streams)
    flat = sum(alone, [])
    assert len(flat) == 3 * 128
    for keys in alone[:-1]:
        kinds = Counter(int(key) // 1000 for key in keys)
        assert abs(kinds[0] - 5) <= 1 and abs(kinds[1] - 3) <= 1 and abs(kinds[2] - 2) <= 1
    counts = Counter(int(key) // 1000 for key in flat[:380])
    assert counts == {0: 190, 1: 114, 2: 76}
    # Inside each data set the samples are consumed evenly, but for the streams' drift against each other.
    for part, truth in enumerate((first, second, third)):
        drawn = Counter(key for key in flat if int(key) // 1000 == part)
        assert max(drawn.values()) - min(drawn[key] for key in truth) <= 2
    assert steps(ranks(weights, 10, 2, epochs=3, num_workers=1)) == alone
    stream = ShardStream(weights, 10, epochs=3)
    head = [batch["key"] for _, batch in zip(range(11), stream, strict=False)]
    others = ranks(weights, 10, 5, epochs=3)
    for other in others:
        other.load_state_dict(stream.state_dict())
    assert head + steps(others) == alone


def test_settings_that_cannot_be(make_shards):
    path, _ = make_shards([5, 5])
    other, _ = make_shards([5], name="other", image=None)
    for options, words in (
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 5, "world_size": 2}, "multiple of 2"),
        ({"rank": 1}, "rank 1 is not below"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"epochs": 0}, "epochs is 0"),
        ({"streams": 3}, "divisor"),
        ({"max_bad_fraction": 2}, "max_bad_fraction"),
        ({"path": path + "x"}, "does not exist"),
        ({"path": {path: 1, other: 1}}, "cannot be mixed: other tensors"),
        ({"path": {path: 0}}, "weight"),
        ({"path": []}, "data.path"),
        ({"path": "pipe:cat {}"}, "allow_pipe"),
        ({"path": "pipe:true", "allow_pipe": True}, "{}"),
    ):
        with pytest.raises(UsageError, match=words) as caught:
            ShardStream(**({"path": path, "batch_size": 4} | options))
        assert "\n" not in str(caught.value)


def test_states_that_do_not_fit(make_shards):
    path, _ = make_shards([5, 5])
    other, _ = make_shards([5, 6], name="other")
    stream = ShardStream(path, 4, seed=3)
    state = stream.state_dict()
    for target, given, words in (
        (ShardStream(path, 4), state, "another seed: 3, this stream has 0"),
        (ShardStream(other, 4, seed=3), state, "another data set"),
        (ShardStream(path, 6, seed=3), state, "4 logical streams.*batch_size 6"),
        (ShardStream(path, 4, seed=3, streams=2), state, "another streams"),
        (ShardStream(path, 4, seed=3), {}, "not a stream's state"),
        (ShardStream(path, 4, seed=3), state | {"stream": [1], "position": [[0]]}, "lacks logical stream 0"),
    ):
        with pytest.raises(UsageError, match=words):
            target.load_state_dict(given)
    moved = ShardStream(path, 4, seed=3)
    next(iter(moved))
    with pytest.raises(UsageError, match="served differs"):
        merge_states([state, moved.state_dict()])
    with pytest.raises(UsageError, match="states of all ranks"):
        merge_states([])
    bigger = ShardStream(path, 8, seed=3)  # another batch size is fine where the streams divide it
    bigger.load_state_dict(moved.state_dict())
    assert len(next(iter(bigger))["key"]) == 8


def test_waiting_is_measured(make_shards, monkeypatch):
    path, _ = make_shards([20])
    plain = Opener.open
    monkeypatch.setattr(Opener, "open", lambda self, shard: (time.sleep(0.3), plain(self, shard))[1])
    for workers in (0, 1):
        stream = ShardStream(path, 4, num_workers=workers)
        assert stream.wait_seconds == 0
        next(iter(stream))
        assert 0.3 <= stream.wait_seconds < 30
        assert stream.manifest.num_samples == 20


def test_importing_the_package_does_not_import_torch():
    code = "import sys, maskalign.data, maskalign.data.format.members; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_shard_is_closed_again(make_shards, caplog):
    """What a callback of a future raises is only logged, and would leave descriptors open."""
    path, _ = make_shards([6] * 12)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        stream = ShardStream(path, 4, epochs=2)
        assert sum(len(batch["key"]) for batch in stream) == 144
        stream.close()
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) == before and not caplog.records
