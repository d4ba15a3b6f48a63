"""Workers that are killed, and a training process that is: nothing is lost, repeated or left behind."""

import collections
import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from maskalign.data import ShardStream, merge_states
from maskalign.errors import RunError

FORK = multiprocessing.get_context("fork")  # starts at once, where a new interpreter would import torch first


def pids(stream):
    return [worker.process.pid for worker in stream._engine.workers]


def test_killed_workers_are_replaced_at_the_exact_place(make_shards, seed, caplog):
    draw = random.Random(seed)
    path, _ = make_shards([9, 20, 1, 30])
    truth = [batch["key"] for batch in ShardStream(path, 6, epochs=6)]
    stream, seen = ShardStream(path, 6, epochs=6, num_workers=3), []
    for batch in stream:
        seen.append(batch["key"])
        if len(seen) % 10 == 0 and len(seen) < len(truth) - 8:
            os.kill(draw.choice(pids(stream)), signal.SIGKILL)
            time.sleep(draw.random() * 0.05)
    assert seen == truth
    assert sum("killed by signal 9" in record.getMessage() for record in caplog.records) >= 4


def test_a_worker_that_keeps_dying_stops_the_run(make_shards, monkeypatch):
    path, _ = make_shards([20])

    def die(*args):
        os._exit(7)

    monkeypatch.setattr("maskalign.data.stream.samples.SampleReader.fill", die)
    with pytest.raises(RunError, match=r"data worker \d died 4 times in a row \(exit status 7\)"):
        next(iter(ShardStream(path, 4, num_workers=2)))


def test_a_fault_of_the_program_in_a_worker_shows_its_trace(make_shards, monkeypatch):
    path, _ = make_shards([20])

    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("maskalign.data.stream.samples.SampleReader.fill", fail)
    with pytest.raises(RuntimeError, match="(?s)Traceback.*a bug"):
        next(iter(ShardStream(path, 4, num_workers=2)))


def test_workers_end_with_the_iteration(make_shards):
    path, _ = make_shards([40])
    stream = ShardStream(path, 4, num_workers=2)
    for _ in stream:
        running = pids(stream)
        break
    deadline = time.time() + 10
    while any(alive(pid) for pid in running):
        assert time.time() < deadline, "a worker outlives its iterator"
        time.sleep(0.05)


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def job(path, folder, world_size, workers):
    """A job of several ranks in one process, stepping together, that keeps what a trainer would keep.

    That is a record of each step, and every third step a checkpoint, replaced at once.
    """
    streams = [
        ShardStream(path, 8, rank=rank, world_size=world_size, num_workers=workers, epochs=5)
        for rank in range(world_size)
    ]
    step, state = 0, folder / "state.json"
    if state.exists():
        saved = json.loads(state.read_text())
        step = saved["step"]
        for stream in streams:
            stream.load_state_dict(saved["stream"])
    with open(folder / "steps.jsonl", "a") as record:
        for parts in zip(*streams, strict=True):
            keys = [key for part in parts for key in part["key"]]
            epochs = [epoch for part in parts for epoch in part["epoch"].tolist()]
            print(json.dumps([step, keys, epochs]), file=record, flush=True)
            time.sleep(0.01)  # so that a busy machine kills the job before it has ended
            step += 1
            if step % 3 == 0:
                merged = merge_states([stream.state_dict() for stream in streams])
                (folder / "new").write_text(json.dumps({"step": step, "stream": merged}))
                os.replace(folder / "new", state)
    (folder / "done").touch()


def test_killed_at_random_moments_and_resumed_on_other_ranks_and_workers(make_shards, tmp_path, seed):
    draw = random.Random(seed)
    path, truth = make_shards([13, 40, 1, 25, 21])
    folder = tmp_path / "run"
    folder.mkdir()
    kills = 0
    while not (folder / "done").exists():
        process = FORK.Process(target=job, args=(path, folder, draw.choice([1, 2, 4]), draw.choice([0, 1])))
        process.start()
        before = lines(folder)
        goal = before + draw.randint(5, 22) if kills < 5 else 10**9
        while process.is_alive() and lines(folder) < goal:
            time.sleep(0.002)
        if process.is_alive():
            time.sleep(draw.random() * 0.01)
            process.kill()
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
    steps = {}  # what a resumed run does again replaces what was lost with the killed one
    for line in (folder / "steps.jsonl").read_text().splitlines():
        try:
            step, keys, epochs = json.loads(line)
        except ValueError:
            continue  # the kill cut the line; the step was done again
        assert steps.setdefault(step, (keys, epochs)) == (keys, epochs), "a step done again is the same step"
    assert kills >= 3
    assert sorted(steps) == list(range(len(steps)))
    seen = collections.Counter((e, k) for keys, epochs in steps.values() for k, e in zip(keys, epochs, strict=True))
    assert seen == collections.Counter((epoch, key) for epoch in range(5) for key in truth)
    assert [steps[i][0] for i in range(len(steps))] == [batch["key"] for batch in ShardStream(path, 8, epochs=5)]


def lines(folder):
    path = folder / "steps.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_workers_of_a_killed_process_end_by_themselves(make_shards):
    path, _ = make_shards([40])
    ours, theirs = FORK.Pipe()

    def run():
        stream = ShardStream(path, 4, num_workers=2)
        batches = iter(stream)
        next(batches)
        theirs.send(pids(stream))
        time.sleep(60)

    process = FORK.Process(target=run)
    process.start()
    workers = ours.recv()
    assert len(workers) == 2
    process.kill()
    process.join()
    deadline = time.time() + 30
    while any(alive(pid) for pid in workers):
        assert time.time() < deadline, "workers outlive the process that started them"
        time.sleep(0.1)
