"""Sets for evaluation: the archive's form, any number of processes, and continuing after a kill."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from maskalign.errors import RunError, UsageError
from maskalign.sampling.npz import write_npz

SHAPE = (4, 5, 3)


def picture_of(index):
    return np.random.default_rng(index).integers(0, 256, SHAPE, dtype=np.uint8)


def draw(indices):
    return np.stack([picture_of(index) for index in indices])


def expected(count):
    return np.stack([picture_of(index) for index in range(count)])


def test_archive_is_adms(tmp_path):
    seen = []
    path = write_npz(
        tmp_path / "new" / "s.npz", 11, SHAPE, draw, settings={"a": (1, 2)}, batch_size=4, on_done=seen.append
    )
    with np.load(path) as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].dtype == np.uint8
        assert np.array_equal(archive["arr_0"], expected(11))
    assert sum(seen) == 11
    assert sorted(file.name for file in path.parent.iterdir()) == ["s.json", "s.npz"]
    # Once complete it is left alone, also by another batch size.
    before = path.stat().st_mtime_ns
    write_npz(path, 11, SHAPE, lambda indices: pytest.fail("drawn again"), settings={"a": [1, 2]}, batch_size=3)
    assert path.stat().st_mtime_ns == before


def test_goes_on_after_an_error(tmp_path):
    drawn = []

    def failing(indices):
        if len(drawn) >= 6:
            raise KeyboardInterrupt
        drawn.extend(indices)
        return draw(indices)

    with pytest.raises(KeyboardInterrupt):
        write_npz(tmp_path / "s.npz", 10, SHAPE, failing, settings={}, batch_size=3)
    assert not (tmp_path / "s.npz").exists()

    def rest(indices):
        assert not set(indices) & set(drawn)
        return draw(indices)

    done = []
    write_npz(tmp_path / "s.npz", 10, SHAPE, rest, settings={}, batch_size=2, on_done=done.append)
    assert done == [6, 2, 2]
    assert np.array_equal(np.load(tmp_path / "s.npz")["arr_0"], expected(10))


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_npz_helper as helper
from maskalign.sampling.npz import write_npz

def slow(indices):
    time.sleep(0.02)
    return helper.draw(indices)

write_npz(sys.argv[2], 300, helper.SHAPE, slow, settings={}, batch_size=1)
"""


def test_survives_kill_9(tmp_path, seed):
    source = open(__file__).read().split("def test_")[0]
    (tmp_path / "test_npz_helper.py").write_text(source)
    target = tmp_path / "s.npz"
    done = tmp_path / "s.partial.done"
    rng = np.random.default_rng(seed)
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path), str(target)])
        before = sum(done.read_bytes()) if done.exists() else 0
        deadline = time.time() + 30
        while time.time() < deadline and not (done.exists() and sum(done.read_bytes()) > before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert sum(done.read_bytes()) > before and not target.exists()
    left = []
    write_npz(target, 300, SHAPE, lambda indices: left.extend(indices) or draw(indices), settings={}, batch_size=1)
    assert 0 < len(left) < 300
    assert np.array_equal(np.load(target)["arr_0"], expected(300))


def draw_by_ranks(path, count, batch_size, world_size, **options):
    """write_npz by ranks that are threads with a real barrier; what each of them drew, by rank."""
    barrier, shares = threading.Barrier(world_size, timeout=60), {rank: [] for rank in range(world_size)}

    def rank_draws(rank):
        def own(indices):
            shares[rank].append(indices)
            return draw(indices)

        write_npz(
            path, count, SHAPE, own, settings={}, batch_size=batch_size, rank=rank, world_size=world_size,
            barrier=barrier.wait, **options,
        )  # fmt: skip

    with ThreadPoolExecutor(world_size) as pool:
        for done in [pool.submit(rank_draws, rank) for rank in range(world_size)]:
            done.result()
    return shares


def test_whole_batches_are_dealt_to_processes(tmp_path):
    path, counts = tmp_path / "s.npz", []
    shares = draw_by_ranks(path, 9, 2, 3, on_done=counts.append)
    assert shares == {0: [[0, 1], [6, 7]], 1: [[2, 3], [8]], 2: [[4, 5]]}
    assert sum(counts) == 9
    assert np.array_equal(np.load(path)["arr_0"], expected(9))


def test_other_ranks_go_on_with_the_same_batches(tmp_path):
    """A set that one process began and three finish: what is done stays, the cuts between batches too."""
    drawn = []

    def failing(indices):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(indices)
        return draw(indices)

    path = tmp_path / "s.npz"
    with pytest.raises(KeyboardInterrupt):
        write_npz(path, 16, SHAPE, failing, settings={}, batch_size=3)
    counts = []
    shares = draw_by_ranks(path, 16, 3, 3, on_done=counts.append)
    assert drawn == [[0, 1, 2], [3, 4, 5]]
    assert shares == {0: [[6, 7, 8], [15]], 1: [[9, 10, 11]], 2: [[12, 13, 14]]}
    assert sum(counts) == pytest.approx(16)
    assert np.array_equal(np.load(path)["arr_0"], expected(16))


def test_other_settings_are_refused(tmp_path):
    write_npz(tmp_path / "s.npz", 2, SHAPE, draw, settings={"steps": 50}, batch_size=2)
    with pytest.raises(UsageError, match="steps 50, now 250"):
        write_npz(tmp_path / "s.npz", 2, SHAPE, draw, settings={"steps": 250}, batch_size=2)
    (tmp_path / "s.json").write_text("{")
    with pytest.raises(UsageError, match="not readable"):
        write_npz(tmp_path / "s.npz", 2, SHAPE, draw, settings={"steps": 250}, batch_size=2)


def test_a_full_disk_is_an_error_before_anything_is_drawn(tmp_path):
    with pytest.raises(RunError, match="make room"):
        write_npz(tmp_path / "s.npz", 10**9, (4096, 4096, 3), lambda i: pytest.fail("drawn"), settings={}, batch_size=2)
