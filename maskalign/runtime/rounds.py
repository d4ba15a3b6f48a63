"""Agree on the number of this start of a job, which torchrun does not provide.

With --max-restarts, torchrun's store outlives the ranks, and it still holds the addresses and entries of ranks that
have ended. Each start therefore needs its own names in the store. TORCHELASTIC_RESTART_COUNT cannot be used for them:
every node counts the failures of its own ranks, so the counts differ as soon as one of two nodes has lost a rank.
"""

import os
import time
import uuid

import torch.distributed as dist

from maskalign.errors import RunError

_current = 0


def join(timeout):
    """Wait for the other ranks of this start, in the store that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE describe.

    Args:
        timeout: timedelta, the time limit for the slowest rank.

    Returns:
        (store, rank, world_size): a store that no other start of the job has written to.

    Raises:
        RunError: some ranks did not start in time.
    """
    global _current
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    _current = agree(_of_job(store), rank, world_size, timeout)
    return current_store(store), rank, world_size


def current_store(store):
    """A connection to the job's store that sees only the names of this start."""
    return dist.PrefixStore(f"start{_current}", _of_job(store))


def _of_job(store):
    return dist.PrefixStore("maskalign/" + os.environ.get("TORCHELASTIC_RUN_ID", "0"), store)


def agree(store, rank, world_size, timeout):
    """The number of this start, the same on all ranks and different from all earlier starts in the store.

    Rank 0 chooses the number. Every other rank asks with a unique word and accepts only an answer that repeats this
    word. Questions of ranks that have ended, and the answers to them, stay in the store without effect.

    Args:
        store: the job's store.
        rank, world_size: of this process.
        timeout: timedelta.

    Raises:
        RunError: a rank did not start in time.
    """
    end = time.monotonic() + timeout.total_seconds()
    pause = 0.02 + world_size / 2000

    def wait(missing):
        if time.monotonic() > end:
            raise RunError(f"{missing} did not start within {timeout.total_seconds():.0f} s; see its log")
        time.sleep(pause)

    if rank > 0:
        word = uuid.uuid4().hex
        store.set(f"question{rank}", word)
        while True:
            if store.check([f"answer{rank}"]):
                repeated, _, number = store.get(f"answer{rank}").decode().rpartition(" ")
                if repeated == word:
                    store.set(f"taken{number}/{rank}", "")
                    return int(number)
            wait("rank 0")
    number = store.add("starts", 1)
    answered, waiting = {}, list(range(1, world_size))
    while waiting:
        for other in waiting:
            if store.check([f"question{other}"]):
                word = store.get(f"question{other}").decode()
                if answered.get(other) != word:
                    answered[other] = word
                    store.set(f"answer{other}", f"{word} {number}")
        waiting = [other for other in waiting if not store.check([f"taken{number}/{other}"])]
        if waiting:
            wait(f"rank {waiting[0]}")
    return number
