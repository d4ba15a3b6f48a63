"""The index at the end of a shard: it says what the headers say, spares reading them, and a wrong one is not used."""

import io
import os
import random
import tarfile

import numpy as np
import pytest

from maskalign.data import ShardStream
from maskalign.data.format import index as module
from maskalign.data.format.index import FOOTER, NAME, ROW, pack_index, read_index
from maskalign.data.format.tar_shards import write_shard
from maskalign.data.stream.open_shard import OpenShard

ENDINGS = ["cls", "png", "lite-2.npy"]


def samples(count, rng, folder=""):
    for number in range(count):
        members = {"cls": b"%d" % (number % 5), "png": rng.bytes(rng.integers(1, 3000))}
        yield f"{folder}{number:08d}", members | {"lite-2.npy": rng.bytes(600)}


def write(tmp_path, count, seed, folder=""):
    """A shard, and its members as the standard library reads them."""
    path = tmp_path / "shard-000000.tar"
    shard = write_shard(path, samples(count, np.random.default_rng(seed), folder))
    with tarfile.open(path) as tar:
        found = [(i.name.encode(), i.offset_data, i.size, int(i.gname[6:], 16)) for i in tar if i.name != NAME]
    return path, shard, found


def opened(path, shard):
    return OpenShard(os.open(path, os.O_RDONLY), shard, ENDINGS, checked=True)


def index_of(path):
    with open(path, "rb") as file:
        return read_index(file.fileno(), os.path.getsize(path))


def contents(path, shard):
    """{key: [bytes of each member]} of what the stream's reader finds."""
    file, found = opened(path, shard), {}
    for i, key in enumerate(file.keys):
        found[key] = [file.read(i, ending) for ending in ENDINGS]
    file.close()
    return found


LONG = "f" * 90 + "/" + "g" * 80 + "/"  # uses ustar's prefix field


# 700 samples: an index longer than what is read of the end at first.
@pytest.mark.parametrize("count, folder", [(0, ""), (1, ""), (40, ""), (700, ""), (60, LONG)])
def test_it_says_what_the_headers_say(tmp_path, seed, count, folder):
    path, shard, found = write(tmp_path, count, seed, folder)
    assert index_of(path) == found and len(found) == 3 * count
    if count == 700:
        assert os.path.getsize(path) - found[-1][1] > module.TAIL
    assert shard.num_samples == count and os.path.getsize(path) == shard.bytes


def test_other_readers_pass_over_it(tmp_path, seed):
    import webdataset

    path, shard, found = write(tmp_path, 5, seed)
    plain = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in plain] == [f"{i:08d}" for i in range(5)]
    assert all(set(sample) - {"__key__", "__url__", "__local_path__"} == set(ENDINGS) for sample in plain)
    with tarfile.open(path) as tar:
        assert tar.getnames() == [name.decode() for name, *_ in found] + [NAME]


def test_opening_a_shard_reads_its_end_only(tmp_path, seed, monkeypatch):
    path, shard, _ = write(tmp_path, 700, seed)
    reads, plain = [], os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: (reads.append(size), plain(fd, size, at))[1])
    file = opened(path, shard)
    assert len(file) == 700 and len(reads) == 3 and sum(reads) < 4 * module.TAIL
    file.close()
    reads.clear()
    monkeypatch.setattr("maskalign.data.stream.open_shard.read_index", lambda fd, size: None)
    file = opened(path, shard)
    assert len(file) == 700 and len(reads) > 3 * 700
    file.close()


def test_no_damage_to_it_costs_a_sample(tmp_path, seed):
    draw = random.Random(seed)
    path, shard, found = write(tmp_path, 12, seed)
    whole, truth = path.read_bytes(), contents(path, shard)
    start = found[-1][1] + (found[-1][2] + 511) // 512 * 512
    believed = 0
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(draw.choice([1, 1, 4])):
            place = draw.randrange(start, len(data))
            how = draw.randrange(3)
            if how == 0:
                data[place] ^= 1 << draw.randrange(8)
            elif how == 1:
                data[place : place + 40] = draw.randbytes(40)
            else:
                del data[place : place + draw.choice([1, 512])]
        path.write_bytes(data)
        assert index_of(path) in (None, found)
        believed += index_of(path) is not None
        assert contents(path, shard) == truth
    assert believed < 100


@pytest.mark.parametrize("change", ["order", "one fewer", "one longer"])
def test_one_that_another_program_copied_is_not_believed(tmp_path, seed, change):
    path, shard, _ = write(tmp_path, 9, seed)
    truth = contents(path, shard)
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]
    index = members.pop()
    if change == "order":  # the same bytes in other places: only a look at a header tells
        members.reverse()
    elif change == "one fewer":
        members = [(info, data) for info, data in members if not info.name.startswith("00000004")]
        del truth[b"00000004"]
    else:
        extra = tarfile.TarInfo("00000008.txt")
        extra.size = 2000
        members.append((extra, bytes(2000)))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in [*members, index]:
            tar.addfile(info, io.BytesIO(data))
    assert index_of(path) is None
    assert contents(path, shard) == truth


@pytest.mark.parametrize("place", [(-512, 10), (0, 10), (512, -1), (512, 2**62), (2**62, 1), (10**9, 1)])
def test_places_outside_the_shard_are_not_believed(tmp_path, seed, place):
    path, shard, found = write(tmp_path, 3, seed)
    data, end = path.read_bytes(), found[-1][1] + 1024
    lie = pack_index([("00000000.cls", *place, 7), *((name.decode(), *rest) for name, *rest in found[1:])], end + 512)
    assert len(lie) == 512 and FOOTER.size + 9 * ROW.itemsize < 512
    path.write_bytes(data[: end + 512] + lie + data[end + 1024 :])
    truth = pack_index([(name.decode(), *rest) for name, *rest in found], end + 512)
    assert index_of(path) is None and data[end + 512 : end + 1024] == truth


def test_the_stream_reads_the_same_with_and_without(make_shards, monkeypatch):
    path, truth = make_shards([10, 0, 23], checksums=True, latent=True)
    used, plain = [], read_index
    watched = lambda fd, size: (used.append(plain(fd, size)), used[-1])[1]  # noqa: E731
    monkeypatch.setattr("maskalign.data.stream.open_shard.read_index", watched)
    first = list(ShardStream(path, 4, epochs=1))
    assert len(used) == 2 and None not in used, "the shard without samples is not opened"
    monkeypatch.setattr("maskalign.data.stream.open_shard.read_index", lambda fd, size: None)
    for batch, other in zip(first, ShardStream(path, 4, epochs=1), strict=True):
        assert batch["key"] == other["key"] and batch["label"].tolist() == [truth[k]["label"] for k in batch["key"]]
        assert all(bool((batch[name] == other[name]).all()) for name in ("image", "moments", "lite:2"))


def test_it_takes_less_than_a_percent_of_the_smallest_samples():
    names = [(f"{i:08d}.{ending}", 2**40, 2**20, 2**31) for i in range(2048) for ending in ("cls", "m.npy", "d.npy")]
    assert len(pack_index(names, 0)) < 0.01 * 2048 * 28_000
