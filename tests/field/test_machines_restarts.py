# ruff: noqa: F401, F811 (fixtures are imported)
"""Nodes that lose a rank: the next start of the job works, whichever node it was and whatever the nodes count."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from maskalign.errors import RunError
from maskalign.runtime.rounds import agree
from maskalign.training.logs import read_metrics
from tests.tiny_runs import command, data_set, run

PATIENCE = timedelta(seconds=60)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(store, ranks, world_size, late=()):
    """The numbers that threads in the place of ranks agree on; those in `late` come after the others."""
    numbers = {}

    def join(rank):
        time.sleep(0.3 if rank in late else 0)
        numbers[rank] = agree(store, rank, world_size, PATIENCE)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return numbers


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_start_has_a_number_of_its_own(world_size, seed):
    store = dist.HashStore()
    rng = random.Random(seed)
    seen = []
    for _ in range(4):
        late = rng.sample(range(world_size), rng.randrange(world_size))
        numbers = start(store, range(world_size), world_size, late)
        assert len(numbers) == world_size and len(set(numbers.values())) == 1
        seen.append(numbers[0])
    assert len(set(seen)) == len(seen)


def test_what_dead_ranks_have_left_in_the_store_misleads_nobody():
    store = dist.HashStore()
    start(store, range(3), 3)
    store.set("question2", "of a rank that died before it had its answer")
    with pytest.raises(RunError, match="rank 0 did not start within"):
        agree(store, 1, 3, timedelta(seconds=0.3))  # died while it waited for rank 0
    numbers = start(store, range(3), 3, late=(2,))
    assert len(numbers) == 3 and len(set(numbers.values())) == 1
    with pytest.raises(RunError, match="rank 1 did not start within"):
        agree(store, 0, 2, timedelta(seconds=0.3))
    assert len(set(start(store, range(2), 2).values())) == 1


def agent(number, port, argv, restarts=2):
    launch = f"--nnodes=2 --nproc-per-node=1 --rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-id=field"
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launch.split(), f"--max-restarts={restarts}"]
        + ["-m", "maskalign", "train", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def children(process):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def wait_for(ready, agents, seconds=150):
    end = time.monotonic() + seconds
    while not ready():
        ended = [a for a in agents if a.poll() is not None]
        if ended or time.monotonic() > end:
            for each in agents:
                each.kill()
            pytest.fail("\n".join(str(each.communicate()[1][-3000:]) for each in agents))
        time.sleep(0.1)


def last_step(path):
    return max((row["step"] for row in read_metrics(path)), default=0) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("victims", [[0], [1], [1, 0]], ids=lambda victims: "then".join(map(str, victims)))
def test_two_nodes_start_again_after_the_rank_of_either_is_killed(command, tmp_path, victims):
    own = dict(training__max_steps=1_000_000, training__checkpoint_every=10, parallel__plan="ddp")
    argv, port = command(**own, training__max_seconds=100_000), free_port()
    agents = [agent(number, port, argv) for number in range(2)]
    metrics = tmp_path / "run" / "metrics.csv"
    try:
        wait_for(lambda: last_step(metrics) >= 30, agents)
        for victim in victims:
            (before,) = children(agents[victim])
            os.kill(before, signal.SIGKILL)
            killed_at = time.monotonic()
            # The rank of the other node is started again as well: only then do both make steps.
            wait_for(lambda: children(agents[victim]) not in ([], [before]), agents)  # noqa: B023
            time.sleep(1)
            step = last_step(metrics)
            wait_for(lambda: last_step(metrics) > step + 20, agents)  # noqa: B023
            print(f"after {time.monotonic() - killed_at:.1f} s")
            assert time.monotonic() - killed_at < 60
        for each in agents:
            each.send_signal(signal.SIGINT)
        errors = [each.communicate(timeout=100)[1] for each in agents]
    finally:
        for each in agents:
            if each.poll() is None:
                each.kill()
    # One restart per kill, none that failed by itself.
    assert not any("did not start within" in error for error in errors)
