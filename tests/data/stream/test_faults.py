"""Damaged, missing and hostile data: the run goes on without it, or stops with one line that says where."""

import http.server
import io
import logging
import os
import random
import re
import tarfile
import threading
import time
from functools import partial

import numpy as np
import pytest
from PIL import Image

from maskalign.data import ShardStream
from maskalign.data.stream.opening import Opener
from maskalign.errors import RunError, UsageError


def read(path, batch_size=4, **options):
    """(stream, {key: label}) of one pass; every sample must be right and come once."""
    stream, seen, bad = (
        ShardStream(path, batch_size, epochs=1, **({"max_bad_fraction": 0.5} | options)),
        {},
        0,
    )
    for batch in stream:
        for key, label in zip(batch["key"], batch["label"].tolist(), strict=True):
            assert key not in seen
            seen[key] = label
        bad += batch["bad"]
    assert bad == len(stream.bad_samples)
    return stream, seen


def labels(truth, without=()):
    return {key: entry["label"] for key, entry in truth.items() if key not in without}


def shard(path, number):
    return os.path.join(path, f"shard-{number:06d}.tar")


class Thing:
    """Something whose unpickling would be noticed."""

    def __reduce__(self):
        return os._exit, (66,)


def object_array(npy):
    return npy(np.array([Thing()], dtype=object))


def fortran(npy):
    return npy(np.asfortranarray(np.ones((4, 6), np.int8)))


def huge_image():
    file = io.BytesIO()
    Image.new("L", (10_000, 10_000)).save(file, "png")
    return file.getvalue()


SAMPLE_FAULTS = {
    "no label": ({"cls": None}, r"no \.cls"),
    "label not a number": ({"cls": b"cat"}, "not an integer"),
    "label below range": ({"cls": b"-1"}, "not an integer"),
    "label out of range": ({"cls": b"5"}, "out of range, there are 5 classes"),
    "label of digits that int() takes but ASCII has not": ({"cls": "٣".encode()}, "not an integer"),
    "label with underscore": ({"cls": b"0_1"}, "not an integer"),
    "huge label": ({"cls": b"1" * 5000}, "5,000 bytes"),
    "empty label": ({"cls": b""}, "not an integer"),
    "no image": ({"png": None}, r"no \.png"),
    "no image in its bytes": ({"png": b"GIF89a, but not really"}, "not a readable image"),
    "cut image": ({"png": lambda old: old[: len(old) // 2]}, "not a readable image"),
    "image of 100 megapixels": ({"png": lambda old: huge_image()}, "10000 x 10000"),
    "no features": ({"lite-2.npy": None}, r"no \.lite-2\.npy"),
    "features of another shape": ({"lite-2.npy": lambda npy: npy(np.ones((4, 5), np.int8))}, r"\(4, 5\)"),
    "features transposed": ({"lite-2.npy": lambda npy: npy(np.ones((6, 4), np.int8))}, r"\(6, 4\)"),
    "features of another dtype": ({"lite-2.npy": lambda npy: npy(np.ones((4, 6), np.float16))}, "float16"),
    "features of another sign": ({"lite-2.npy": lambda npy: npy(np.ones((4, 6), np.uint8))}, "uint8"),
    "features in Fortran order": ({"lite-2.npy": fortran}, "Fortran"),
    "pickled objects": ({"lite-2.npy": object_array}, "objects|checks|npy"),
    "pickled objects of the right size": (
        {"lite-2.npy": lambda npy: object_array(npy)[:128] + b"x" * 24}, "objects",
    ),
    "no npy": ({"lite-2.npy": b"x" * 152}, "no valid .npy"),
    "tiny npy": ({"lite-2.npy": b"\x93NUMPY"}, "no valid .npy"),
}  # fmt: skip


# Two kinds are enough for the way through a worker.
@pytest.mark.parametrize(
    ("name", "workers"), [*((name, 0) for name in SAMPLE_FAULTS), ("no label", 1), ("pickled objects", 1)]
)
def test_one_bad_sample_is_passed_over_and_named_once(make_shards, caplog, name, workers):
    changes, words = SAMPLE_FAULTS[name]

    def change(key, members):
        if key != "00000013":
            return members
        for ending, new in changes.items():
            old = members.pop(ending)
            if callable(new):
                new = new(make_shards.npy if ending.endswith("npy") else old)
            if new is not None:
                members[ending] = new
        return members

    path, truth = make_shards([10, 10, 10], change=change)
    with caplog.at_level(logging.WARNING):
        stream = ShardStream(path, 4, epochs=2, max_bad_fraction=0.05, num_workers=workers)
        keys, bad = [], 0
        for batch in stream:
            keys += batch["key"]
            bad += batch["bad"]
    good = set(truth) - {"00000013"}
    assert sorted(keys) == sorted([*good, *good])
    assert bad == 1 and len(stream.bad_samples) == 1
    named = [record.getMessage() for record in caplog.records if "00000013" in record.getMessage()]
    assert len(named) == 1 and "shard-000001.tar" in named[0]
    assert re.search(words, named[0]), named[0]


def test_bad_samples_do_not_depend_on_ranks_and_workers(make_shards, seed):
    draw = random.Random(seed)
    bad = {f"{i:08d}" for i in draw.sample(range(60), 15)}

    def change(key, members):
        return members | {"cls": b"?"} if key in bad else members

    path, truth = make_shards([7, 20, 13, 20], change=change)

    def run(world_size, workers, **options):
        streams = [
            ShardStream(path, 8, rank=r, world_size=world_size, num_workers=workers, max_bad_fraction=0.5, **options)
            for r in range(world_size)
        ]
        steps = []
        for _, *parts in zip(range(16), *streams, strict=False):
            keys = []
            for part in parts:
                assert part["slot"] == len(keys) or len(keys) < 8, "contiguous slots of the global batch"
                keys += part["key"]
            steps.append(keys)
        return steps

    alone = run(1, 0)
    assert not bad & {key for keys in alone for key in keys}
    assert all(len(keys) == 8 for keys in alone)
    assert run(1, 2) == run(2, 0) == run(4, 1) == alone
    finite = run(1, 0, epochs=2)
    assert sorted(sum(finite, [])) == sorted([*(set(truth) - bad)] * 2)
    assert [sorted(keys) for keys in run(4, 0, epochs=2) if keys] == [sorted(keys) for keys in finite]
    shared = run(1, 0, epochs=2, streams=1)
    assert [keys for keys in run(2, 2, epochs=2, streams=1) if keys] == shared


def test_resuming_among_bad_samples_names_none_again(make_shards, caplog):
    path, truth = make_shards([10, 10, 10], change=lambda key, m: m | {"cls": b"?"} if key.endswith("3") else m)
    stream = ShardStream(path, 4, epochs=1, max_bad_fraction=0.5)
    seen = [key for _, batch in zip(range(4), stream, strict=False) for key in batch["key"]]
    named = len(stream.bad_samples)
    again = ShardStream(path, 4, epochs=1, max_bad_fraction=0.5)
    again.load_state_dict(stream.state_dict())
    for batch in again:
        seen += batch["key"]
    assert sorted(seen) == sorted(key for key in truth if not key.endswith("3"))
    assert named + len(again.bad_samples) == 3


@pytest.mark.parametrize("checksums", [True, False])
def test_shards_that_are_cut_off_empty_or_missing(make_shards, checksums, caplog):
    path, truth = make_shards([10] * 8, checksums=checksums)
    data = open(shard(path, 1), "rb").read()
    with open(shard(path, 1), "wb") as file:
        file.write(data[: len(data) // 2 + 100])
    open(shard(path, 3), "wb").close()
    os.remove(shard(path, 5))
    lost = {key for key, entry in truth.items() if entry["shard"] in (1, 3, 5)}
    stream, seen = read(path)
    assert set(seen) >= set(truth) - lost and seen.items() <= labels(truth).items()
    # With a checksum per sample, what lies before the cut is as good as ever: about half.
    assert 53 <= len(seen) <= 57 if checksums else len(seen) == 50
    assert len(stream.bad_samples) == 80 - len(seen)
    assert sum("shard-000005.tar with 10 samples: missing" in r.getMessage() for r in caplog.records) == 1


def test_flipped_bytes_cost_one_sample_each(make_shards, seed):
    draw = random.Random(seed)
    path, truth = make_shards([20] * 3, checksums=True, latent=True)
    with tarfile.open(shard(path, 1)) as tar:
        places = {info.name: (info.offset_data, info.size) for info in tar}
    for name in ("00000022.cls", "00000027.png", "00000031.moments.npy", "00000035.lite-2.npy"):
        offset, size = places[name]
        with open(shard(path, 1), "r+b") as file:
            at = offset + draw.randrange(size)
            file.seek(at)
            old = file.read(1)[0]
            file.seek(at)
            # For the label: another digit that is a label as well.
            file.write(
                bytes([ord("0") + (old - ord("0") + 1) % 5 if name.endswith("cls") else old ^ 1 << draw.randrange(8)])
            )
    stream, seen = read(path, max_bad_fraction=0.1)
    assert seen == labels(truth, {"00000022", "00000027", "00000031", "00000035"})
    assert all("checksum" in line for line in stream.bad_samples) and len(stream.bad_samples) == 4
    _, trusted = read(path, verify=False, fields=["lite:2"])
    assert trusted["00000022"] != truth["00000022"]["label"], "the flip is one that only a checksum can see"


def test_a_shard_rewritten_by_another_tool_is_read_sample_by_sample(make_shards):
    path, truth = make_shards([10] * 3, checksums=True)
    with tarfile.open(shard(path, 1)) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(shard(path, 1), "w") as tar:
        for name, data in members:
            if name != "00000014.cls":
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    stream, seen = read(path, max_bad_fraction=0.1)
    assert seen == labels(truth, {"00000014"})


def test_a_foreign_shard_that_is_not_what_the_manifest_says_is_not_used(make_shards):
    path, truth = make_shards([10] * 3)
    data = bytearray(open(shard(path, 1), "rb").read())
    data[512] = ord("0") + (data[512] - ord("0") + 1) % 5  # the first label
    open(shard(path, 1), "wb").write(data)
    stream, seen = read(path)
    assert seen == labels({key: entry for key, entry in truth.items() if entry["shard"] != 1})
    assert "SHA-256" in stream.bad_samples[0]


def test_too_many_bad_samples_stop_the_run_with_one_line(make_shards):
    path, _ = make_shards([10] * 10)
    for number in (2, 4, 6):
        os.remove(shard(path, number))
    for workers in (0, 2):
        with pytest.raises(RunError, match="shard-00000[246].tar") as caught:
            read(path, max_bad_fraction=0.2, num_workers=workers)
        assert "\n" not in str(caught.value) and "max_bad_fraction" in str(caught.value)
    assert len(read(path, max_bad_fraction=0.3)[1]) == 70
    for number in range(10):
        if os.path.exists(shard(path, number)):
            os.remove(shard(path, number))
    with pytest.raises(RunError, match="of 100 samples are bad"):
        next(iter(ShardStream(path, 4)))
    with pytest.raises(RunError, match="no good sample left"):
        next(iter(ShardStream(path, 4, max_bad_fraction=1.0)))


def test_nothing_else_in_a_shard_is_opened(make_shards):
    import pickle

    def change(key, members):
        return members | {
            "pyd": pickle.dumps(Thing()),
            "pkl": pickle.dumps(Thing()),
            "pth": pickle.dumps(Thing()),
        }

    path, truth = make_shards([5, 5], change=change)
    assert read(path)[1] == labels(truth)


def test_long_names_and_folders_in_a_shard(make_shards):
    path, truth = make_shards([4, 4])
    renamed = {}
    with tarfile.open(shard(path, 1)) as tar:
        members = [(info.name, tar.extractfile(info).read()) for info in tar]
    with tarfile.open(shard(path, 1), "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(_folder("a-folder"))
        for name, data in members:
            key, _, ending = name.partition(".")
            long = f"a-folder/{'x' * 150}-é-{key}"
            renamed[long] = truth[key]["label"]
            info = tarfile.TarInfo(f"{long}.{ending}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    make_shards.manifest(path, [("shard-000000.tar", 4), ("shard-000001.tar", 4)])
    assert read(path)[1] == labels({k: e for k, e in truth.items() if e["shard"] == 0}) | renamed


def _folder(name):
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


# -- remote data


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder; `fault(handler, times this path was asked for)` answers in its stead if it is true."""

    daemon_threads = True

    def __init__(self, folder, fault=lambda handler, times: False):
        self.asked, self.fault = {}, fault
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):  # noqa: N802
        times = self.server.asked[self.path] = self.server.asked.get(self.path, 0) + 1
        if not self.server.fault(self, times):
            super().do_GET()

    def log_message(self, *args):
        return


@pytest.fixture
def serve(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(folder, fault=lambda handler, times: False):
        servers.append(Server(folder, fault))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def quick_retries(monkeypatch):
    plain = Opener.__init__
    monkeypatch.setattr(
        Opener, "__init__", lambda self, *a, **k: (plain(self, *a, **k), setattr(self, "pause", 0.01))[0]
    )


def status(code):
    def answer(handler):
        handler.send_error(code)
        return True

    return answer


@pytest.mark.parametrize("workers", [0, 2])
def test_http_server_that_fails_twice_and_then_serves(make_shards, serve, quick_retries, workers):
    path, truth = make_shards([10] * 3)
    server = serve(path, lambda handler, times: times <= 2 and handler.path.endswith("tar") and status(500)(handler))
    stream, seen = read(server.url, num_workers=workers)
    assert seen == labels(truth) and not stream.bad_samples
    assert all(times == 3 for name, times in server.asked.items() if name.endswith("tar")) or workers


def test_http_server_that_hangs_or_breaks_off(make_shards, serve, quick_retries):
    path, truth = make_shards([10] * 4)

    def fault(handler, times):
        if handler.path.endswith("1.tar"):  # for ever
            time.sleep(20)
            return True
        if handler.path.endswith("2.tar") and times == 1:  # once, in the middle
            data = open(path + handler.path, "rb").read()
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data[:3000])
            return True
        return False

    server = serve(path, fault)
    start = time.perf_counter()
    stream, seen = read(server.url, timeout=0.3, retries=1)
    assert time.perf_counter() - start < 15
    assert seen == labels({key: entry for key, entry in truth.items() if entry["shard"] != 1})
    assert "no answer within 0.3 s" in stream.bad_samples[0] or "timed out" in stream.bad_samples[0]
    assert server.asked["/shard-000001.tar"] == 2


def test_http_errors_that_stay(make_shards, serve, quick_retries):
    path, truth = make_shards([10] * 4)
    server = serve(
        path,
        lambda handler, times: handler.path[-5] in "03" and status({"0": 404, "3": 503}[handler.path[-5]])(handler),
    )
    stream, seen = read(server.url, retries=2)
    assert seen == labels({key: entry for key, entry in truth.items() if entry["shard"] in (1, 2)})
    assert server.asked["/shard-000000.tar"] == 1, "a missing file is not asked for again"
    assert server.asked["/shard-000003.tar"] == 3
    with pytest.raises((UsageError, RunError)) as caught:
        ShardStream(server.url + "/nowhere", 4)
    assert "\n" not in str(caught.value)


def test_local_cache(make_shards, serve, tmp_path):
    path, truth = make_shards([10] * 3)
    server = serve(path)
    cache = str(tmp_path / "cache")
    for workers in (2, 0):
        assert read(server.url, cache_dir=cache, num_workers=workers)[1] == labels(truth)
    assert {server.asked[f"/shard-{i:06d}.tar"] for i in range(3)} == {1}, "each shard is fetched once"
    [folder] = os.listdir(cache)
    cached = os.path.join(cache, folder, "shard-000001.tar")
    assert open(cached, "rb").read() == open(shard(path, 1), "rb").read()
    with open(cached, "r+b") as file:  # half a copy is no copy
        file.truncate(1000)
    assert read(server.url, cache_dir=cache)[1] == labels(truth)


def test_fsspec_urls(make_shards):
    import fsspec

    path, truth = make_shards([10] * 3)
    memory = fsspec.filesystem("memory")
    memory.put(path, "/a-set", recursive=True)
    try:
        assert read("memory://a-set")[1] == labels(truth)
        memory.rm("/a-set/shard-000001.tar")
        stream, seen = read("memory://a-set")
        assert seen == labels({key: entry for key, entry in truth.items() if entry["shard"] != 1})
        assert "missing" in stream.bad_samples[0]
    finally:
        memory.rm("/a-set", recursive=True)
    assert read(f"file://{path}")[1] == labels(truth)


def test_pipes_run_only_where_they_are_allowed(make_shards, tmp_path):
    path, truth = make_shards([10] * 3)
    with pytest.raises(UsageError, match="allow_pipe"):
        ShardStream(f"pipe:touch {tmp_path}/ran; cat {path}/{{}}", 4)
    assert not (tmp_path / "ran").exists()
    assert read(f"pipe:cat {path}/{{}}", allow_pipe=True)[1] == labels(truth)
