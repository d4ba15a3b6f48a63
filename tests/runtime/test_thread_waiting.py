"""Whether others are busy is read from the kernel's counts, and acted on before torch is loaded."""

import os
import subprocess
import sys
import time

import pytest

from maskalign.runtime import thread_waiting
from maskalign.runtime.thread_waiting import Reading, look, make_room, share_of_others


@pytest.mark.parametrize(
    "busy, own, expected",
    [(0.0, 0.0, 0.0), (1.0, 1.0, 0.0), (2.0, 0.0, 1.0), (1.5, 0.5, 0.5), (0.4, 0.5, 0.0), (9.0, 0.0, 1.0)],
)
def test_share(busy, own, expected):
    before = Reading(clock=10.0, busy=100.0, own=3.0, processors=2)
    assert share_of_others(before, Reading(11.0, 100.0 + busy, 3.0 + own, 2)) == pytest.approx(expected)
    assert share_of_others(before, before) == 0


def test_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2}, raising=False)
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    stat = tmp_path / "stat"
    stat.write_text(
        "cpu 9 9 9 9 9 9 9 9 9 9\ncpu0 100 10 20 5000 70 1 2 3 40 0\ncpu1 7 7 7 7 7 7 7 7 7 7\n"
        "cpu2 200 0 0 9000 0 0 0 0 0 0\ncpu20 7 7 7 7 7 7 7 7 7 7\nintr 5 6\n"
    )
    found = look(str(stat))
    assert found.processors == 2 and found.busy == pytest.approx((136 + 200) / 100)
    for text in ("", "cpu0 1 2\n", "cpu0 a b c d e f g h\n"):
        stat.write_text(text)
        found = look(str(stat))
        assert found is None or found.processors == 0
    assert look(str(tmp_path / "none")) is None


@pytest.fixture
def clean(monkeypatch):
    for name in (*thread_waiting.OWN_CHOICE, "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "x")  # noted, so that what make_room sets is undone
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(thread_waiting, "LEAST_SECONDS", 0)


@pytest.mark.parametrize("busy, sleeps", [(1.9, True), (0.1, False)])
def test_threads_sleep_where_others_are_busy(busy, sleeps, clean, monkeypatch):
    before = Reading(time.monotonic() - 1, 0.0, 0.0, 2)
    monkeypatch.setattr(thread_waiting, "look", lambda: Reading(before.clock + 1, busy, 0.0, 2))
    make_room(before)
    assert os.environ.get("OMP_WAIT_POLICY") == ("passive" if sleeps else None)


@pytest.mark.parametrize("reason", ["chosen", "torch", "torchrun", "unknown"])
def test_left_alone(reason, clean, monkeypatch):
    before = Reading(time.monotonic() - 1, 0.0, 0.0, 2)
    monkeypatch.setattr(thread_waiting, "look", lambda: Reading(before.clock + 1, 2.0, 0.0, 2))
    if reason == "chosen":
        monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    elif reason == "torch":
        monkeypatch.setitem(sys.modules, "torch", object())
    elif reason == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    make_room(None if reason == "unknown" else before)
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.skipif(look() is None, reason="this system does not tell how busy it is")
def test_busy_processes_are_seen():
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        time.sleep(0.3)
        before = look()
        time.sleep(0.7)
        assert share_of_others(before, look()) > thread_waiting.SHARE
    finally:
        for process in spinning:
            process.kill()
            process.wait()
