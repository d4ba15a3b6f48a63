"""Worker processes that read ahead: each owns some of the rank's streams and writes their rows into shared memory.

A worker of torch's DataLoader makes whole batches, and cannot be replaced when it dies. Here the streams of a rank are
divided among the workers, which all fill their rows of the same block. A worker that is killed is started again at the
position of its last finished step, so no sample is lost, repeated or reordered.
"""

import logging
import mmap
import multiprocessing
import os
import signal
import traceback
from collections import deque
from multiprocessing.connection import wait
from multiprocessing.reduction import recv_handle, send_handle

from maskalign.errors import RunError, UsageError

log = logging.getLogger(__name__)

MAX_RESTARTS = 3  # restarts of one worker without a finished step in between


class InProcess:
    """For num_workers=0: the interface of `WorkerPool`, which reads in this process, without reading ahead."""

    def __init__(self, make_reader, pool, shares, positions, plan):
        self.reader = make_reader(shares, positions)
        self.pool, self.plan = pool, plan

    def next(self):
        """(arrays, [(first row, Filled)]) of the next step of the plan, None after the last."""
        step = next(self.plan, None)
        if step is None:
            return None
        _, arrays = self.pool.lease()
        return arrays, [(0, self.reader.fill(*step, arrays, 0))]

    def close(self):
        """Close the shards."""
        self.reader.close()


class _Worker:
    """One process, the streams it owns, and its pending tasks."""

    def __init__(self, number, shares, positions):
        self.number, self.shares = number, shares
        self.positions = {share.stream: positions[share.stream] for share in shares}
        self.pending, self.results, self.failures = deque(), deque(), 0
        self.process = self.connection = None
        self.known_blocks = set()


class WorkerPool:
    """Worker processes for the streams of one rank.

    Args:
        make_reader: (shares, positions) -> `SampleReader`; called in the worker.
        pool: shared `buffers.BlockPool`.
        shares, positions: the rank's streams and their positions.
        plan: iterator of (start, stop), the samples of each step.
        first_row: (preceding shares, start, stop) -> the number of rows that these shares fill.
        num_workers: number of processes; at most one per stream is started.
        prefetch: number of steps that are read ahead.
    """

    def __init__(self, make_reader, pool, shares, positions, plan, first_row, num_workers, prefetch):
        self.make_reader, self.pool, self.plan, self.first_row = make_reader, pool, plan, first_row
        self.prefetch, self.steps = prefetch, deque()
        # Fork, as the DataLoader does: workers use neither torch nor CUDA, and scripts need no main guard.
        self.context = multiprocessing.get_context("fork")
        count = min(num_workers, len(shares))
        cuts = [len(shares) * i // count for i in range(count + 1)]
        self.before = [shares[:low] for low in cuts[:-1]]
        self.workers = [_Worker(i, shares[cuts[i] : cuts[i + 1]], positions) for i in range(count)]
        for worker in self.workers:
            self._start(worker)

    def next(self):
        """(arrays, [(first row, Filled), ...]) of the next step of the plan, None after the last."""
        while len(self.steps) < self.prefetch and (step := next(self.plan, None)) is not None:
            number, arrays = self.pool.lease()
            rows = [self.first_row(before, *step) for before in self.before]
            self.steps.append((arrays, rows))
            for worker, row in zip(self.workers, rows, strict=True):
                task = (*step, number, row)
                worker.pending.append(task)
                self._send(worker, task)
        if not self.steps:
            return None
        while waiting := [worker for worker in self.workers if not worker.results]:
            ready = wait([worker.connection for worker in waiting])
            for worker in waiting:
                if worker.connection in ready:
                    self._receive(worker)
        arrays, rows = self.steps.popleft()
        done = [worker.results.popleft() for worker in self.workers]
        return arrays, list(zip(rows, done, strict=True))

    def _start(self, worker):
        parent, child = self.context.Pipe()
        inherited = [other.connection for other in self.workers if other.connection is not None] + [parent]
        worker.process = self.context.Process(
            target=_work,
            args=(
                child,
                inherited,
                self.make_reader,
                worker.shares,
                worker.positions,
                self.pool.layout,
                os.getpid(),
            ),
            name=f"maskalign-data-{worker.number}",
            daemon=True,
        )
        worker.process.start()
        child.close()
        worker.connection, worker.known_blocks = parent, set()
        for task in worker.pending:
            self._send(worker, task)

    def _send(self, worker, task):
        number = task[2]
        try:
            if number not in worker.known_blocks:
                worker.connection.send(number)
                send_handle(worker.connection, self.pool.descriptors[number], worker.process.pid)
                worker.known_blocks.add(number)
            worker.connection.send(task)
        except (BrokenPipeError, ConnectionResetError):
            return  # the worker is dead; _receive detects it and repeats all pending tasks

    def _receive(self, worker):
        try:
            answer = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            self._replace(worker)
            return
        if isinstance(answer, tuple):
            kind, text = answer
            raise {"UsageError": UsageError, "RunError": RunError}.get(kind, RuntimeError)(text)
        worker.positions = {**worker.positions, **answer.positions}
        worker.pending.popleft()
        worker.results.append(answer)
        worker.failures = 0

    def _replace(self, worker):
        worker.connection.close()
        worker.process.join()
        code = worker.process.exitcode
        how = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
        worker.failures += 1
        if worker.failures > MAX_RESTARTS:
            raise RunError(
                f"data worker {worker.number} died {worker.failures} times in a row ({how}); "
                "lower data.num_workers if memory ran out"
            )
        log.warning("data worker %d died (%s); another one continues at its position", worker.number, how)
        self._start(worker)

    def close(self):
        """Stop all workers."""
        for worker in self.workers:
            worker.connection.close()
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(2)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self.workers = []


def _work(connection, inherited, make_reader, shares, positions, layout, parent):
    """The main loop of a worker: receive tasks, fill rows, answer. It ends when the parent has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    blocks = {}
    try:
        reader = make_reader(shares, positions)
        while True:
            while not connection.poll(5):
                if os.getppid() != parent:
                    return
            task = connection.recv()
            if isinstance(task, int):
                descriptor = recv_handle(connection)
                blocks[task] = layout.arrays(mmap.mmap(descriptor, layout.bytes))[0]
                os.close(descriptor)
                continue
            start, stop, number, row = task
            connection.send(reader.fill(start, stop, blocks[number], row))
    except (EOFError, ConnectionError):
        return
    except (UsageError, RunError) as error:
        connection.send((type(error).__name__, str(error)))
    except Exception:
        connection.send(("crash", f"data worker failed:\n{traceback.format_exc()}"))
