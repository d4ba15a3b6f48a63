"""Run tasks in worker processes, wait for other ranks, and print progress lines."""

import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice

from maskalign.errors import RunError


def available_cores():
    """CPU cores that this process may use, shared with the other local ranks under torchrun; at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def in_processes(function, tasks, workers, *, set_up=None, shared=(), meanwhile=None):
    """Yield `function(*task)` for each task, in the order in which the tasks finish.

    Args:
        function: a function of a module (picklable); tasks and results must be picklable too.
        tasks: iterable of tuples of arguments. It is read only a few tasks ahead, so it may be long.
        workers: number of processes; with 0 or 1, all tasks run in this process, in order.
        set_up, shared: `set_up(*shared)` is called first in each worker process, but not if all tasks run in this one.
        meanwhile: called in this process a few times per second while the workers run.

    Raises:
        RunError: a process died. Errors of the function are raised unchanged.
    """
    if workers <= 1:
        for task in tasks:
            yield function(*task)
        return
    # Not fork: the caller may run threads (of torch or a notebook) whose locks a forked child would inherit.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(set_up, shared))
    tasks = iter(tasks)
    try:
        running = {pool.submit(function, *task) for task in islice(tasks, 2 * workers)}
        while running:
            done, running = wait(running, timeout=0.2 if meanwhile else None, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, *task) for task in islice(tasks, len(done))}
            for future in done:
                yield future.result()
            if meanwhile:
                meanwhile()
    except BrokenProcessPool:
        raise RunError(
            "a worker process died (killed, or out of memory?); run the same command again to resume, "
            "with fewer --workers if memory is short"
        ) from None
    finally:
        # On an error or Ctrl-C, no further task is started; running tasks finish.
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(set_up, shared):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and lets running tasks finish
    if set_up:
        set_up(*shared)


def wait_for(ready, seconds, what):
    """Poll `ready()` until its result is true, and return the result; raises RunError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (result := ready()):
        if time.monotonic() > deadline:
            raise RunError(f"waited {seconds:.0f} s for {what}; is every rank of the job still running?")
        time.sleep(0.05)
    return result


class LinePrinter:
    """Prints lines, unless `quiet`. Characters that the terminal's encoding lacks are replaced."""

    def __init__(self, quiet):
        self.quiet = quiet

    def __call__(self, line):
        if not self.quiet:
            encoding = sys.stdout.encoding or "ascii"
            print(line.encode(encoding, "replace").decode(encoding), flush=True)
