"""The number of this start of a job, on which its ranks agree because torchrun's agents do not know it.

With --max-restarts torchrun's store outlives the ranks: it holds the addresses and notes of those that are dead. Each
start therefore needs names of its own in the store. TORCHELASTIC_RESTART_COUNT cannot give them: every node counts the
failures of its own ranks, so the counts differ as soon as one of two nodes has lost a rank.
"""

import os
import time
import uuid

import torch.distributed as dist

from maskalign.errors import RunError

_current = 0


def join(timeout):
    """Meet the other ranks of this start in the store that MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE describe.

    Args:
        timeout: timedelta, for the slowest rank to come.

    Returns:
        (store, rank, world_size): a store that no other start of the job has written to.

    Raises:
        RunError: some ranks did not come.
    """
    global _current
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    _current = agree(_of_job(store), rank, world_size, timeout)
    return current_store(store), rank, world_size


def current_store(store):
    """A connection to the job's store, narrowed to the names of this start."""
    return dist.PrefixStore(f"start{_current}", _of_job(store))


def _of_job(store):
    return dist.PrefixStore("maskalign/" + os.environ.get("TORCHELASTIC_RUN_ID", "0"), store)


def agree(store, rank, world_size, timeout):
    """The number of this start, the same on all ranks, and never one that the store has seen before.

    Rank 0 chooses the number. Each other rank asks with a unique word, and accepts only an answer that repeats it:
    questions of dead ranks, and answers to them, stay in the store without effect.
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
