"""Stop signals, hung ranks and lost ranks: all ranks act together, and one line gives the reason.

Stopping: SIGINT, SIGTERM and SIGUSR1 (Slurm's warning before the time limit) request a stop. The ranks agree on the
step after which all of them stop and save. After SIGTERM and SIGUSR1, the file RUN/REQUEUE tells the job script that
the same command resumes the run.

Hanging: each rank has a watchdog, a thread that writes the rank's state to torchrun's key-value store. If a rank makes
no progress for `training.timeout`, its watchdog compares the states of all ranks, prints the rank for which the others
wait, and ends the job.
"""

import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from maskalign.errors import RunError
from maskalign.runtime import rounds
from maskalign.runtime.files import write_atomically

REQUEUE = "REQUEUE"
PATIENT = ("sample", "evaluate", "save", "set up", "end")  # phases without a time limit
LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Timed out", "Socket", "TCPStore", "Broken pipe")


class Stop:
    """A request of any rank to stop, on which all ranks agree.

    This is a context manager that catches signals. The first signal requests a stop after the current step; a second
    Ctrl-C ends this process immediately.
    """

    def __init__(self):
        self.signal = 0  # the signal that this rank received
        self.agreed = 0  # the signal for which all ranks stop
        self.since = 0.0
        self.group = None
        self.question, self.pending = None, None
        self.previous = {}

    def join(self):
        """Agree with the other ranks from now on. Every rank must call this at the same time."""
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # the watchdog has a shorter timeout

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self.previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        # torchrun forwards a Ctrl-C that the terminal also sends to all processes: within a second it is the same one.
        if self.signal and number == signal.SIGINT and time.monotonic() - self.since > 1:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                tqdm.write(f"{signal.Signals(number).name}: stopping after this step, with a checkpoint")

    def agree(self):
        """Whether all ranks stop now. All ranks call this once per step.

        On several ranks, this returns the result of the previous step's all-reduce, so that no rank waits for it.
        """
        if self.group is None:
            self.agreed = int(self.signal)
        else:
            self.finish()
            if not self.agreed:
                self.question = torch.tensor(int(self.signal))
                self.pending = dist.all_reduce(self.question, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return bool(self.agreed)

    def finish(self):
        """Wait for the pending all-reduce, so that no message is pending when the ranks end."""
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
            self.agreed = int(self.question)

    @property
    def wants_requeue(self):
        """Whether the signal came from a scheduler, and not from Ctrl-C."""
        return self.agreed in (signal.SIGTERM, signal.SIGUSR1)


def mark_requeue(run_dir, step):
    """Write RUN/REQUEUE: this run was interrupted at `step` and saved, and the same command resumes it."""
    write_atomically(Path(run_dir, REQUEUE), f"stopped and saved at step {step}; the same command resumes\n".encode())


def clear_requeue(run_dir):
    Path(run_dir, REQUEUE).unlink(missing_ok=True)


class Watchdog:
    """Ends a job of several ranks that makes no progress, with one line that names the rank and the step.

    Before `join`, and in a single process, it only stores step and phase.

    Args:
        timeout: seconds without progress.
    """

    def __init__(self, timeout):
        self.timeout = timeout
        self.interval = min(5.0, timeout / 8)
        self.step, self.phase, self.beats = 0, "set up", 0
        self.progress = 0
        self.done = threading.Event()
        self.main = threading.main_thread().ident
        self.rank, self.world_size, self.store = 0, 1, None

    def join(self):
        """Start to watch, together with the watchdogs of all other ranks."""
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.store = _store()
        if self.store is not None:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase, step=None):
        """Record progress: this rank is now in `phase` (data, step, save, sample, evaluate, ...) of `step`."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.progress += 1

    def was_told(self):
        """Whether a watchdog has printed the reason why the job ends."""
        try:
            return self.store is not None and self.store.check(["told"])
        except (RuntimeError, dist.DistError):
            return False  # the store does not exist any more

    def close(self):
        """Stop watching."""
        self.phase = "end"
        self.done.set()

    def _watch(self):
        seen, since = -1, time.monotonic()
        try:
            self._tell()
            while not self.done.wait(self.interval):
                self._tell()
                if self.progress != seen or self.phase in PATIENT:
                    seen, since = self.progress, time.monotonic()
                elif time.monotonic() - since >= self.timeout:
                    line = self._judge()
                    if line and self.progress == seen and not self.done.is_set():
                        self._end(line)
        except (RuntimeError, dist.DistError):
            return  # the store ended with the job's first rank; torchrun ends this process

    def _tell(self):
        self.beats += 1
        note = {"beats": self.beats, "step": self.step, "phase": self.phase, "calls": collectives_begun()}
        self.store.set(f"rank{self.rank}", json.dumps(note | {"place": self._place()}))

    def _place(self):
        """File, line and function of the main thread, as a hint why a rank hangs."""
        frame = sys._current_frames().get(self.main)
        if frame is None:
            return "its end"
        return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_name}"

    def _notes(self):
        keys = [f"rank{rank}" for rank in range(self.world_size)]
        return [json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys]

    def _judge(self):
        """One line that names the rank that blocks the job; None if a rank is in a phase without a time limit."""
        before = self._notes()
        for _ in range(3):  # time for the watchdogs of all ranks to update their notes
            time.sleep(self.interval)
            self._tell()
        now = self._notes()
        took = f"within training.timeout {self.timeout:g} s"
        silent = [r for r, (a, b) in enumerate(zip(before, now, strict=True)) if a is None or a["beats"] == b["beats"]]
        if silent:
            # The last note of a silent rank may be some steps old; the waiting ranks know the current step.
            step = max(note["step"] for note in now if note)
            return f"{_ranks(silent)} did not respond {took} in step {step + 1}: stopped, or its machine is lost"
        if any(note["phase"] in PATIENT for note in now):
            return None
        last = min((note["step"], note["calls"]) for note in now)
        late = [r for r, note in enumerate(now) if (note["step"], note["calls"]) == last]
        where = "; ".join(f"rank {r} is in {now[r]['phase']} at {now[r]['place']}" for r in late[:4])
        if len(late) < self.world_size:
            return f"{_ranks(late)} made no progress in step {last[0] + 1} {took}, the others wait ({where})"
        return f"all ranks wait in step {last[0] + 1}, which did not end {took} ({where})"

    def _end(self, line):
        """Print the line once and end this process, whose main thread waits in a collective."""
        if self.store.add("told", 1) == 1:
            hint = "see that rank's log, or raise training.timeout; the last checkpoint is kept"
            print(f"\nmaskalign: failed: {line}; {hint}", file=sys.stderr, flush=True)
        else:
            time.sleep(2)  # torchrun ends all processes when the first one ends
        os._exit(1)


def lost_contact(error, watchdog):
    """Convert an error that torch raises because another rank has ended to a RunError with this rank and step.

    Returns:
        The RunError, or None for other errors.
    """
    text = str(error)
    known = isinstance(error, (RuntimeError, OSError)) and not isinstance(error, RunError)
    if (
        watchdog.world_size == 1
        or not known
        or not (isinstance(error, dist.DistError) or any(word in text for word in LOST))
    ):
        return None
    reason = text.strip().splitlines()[0].split("] ", 1)[-1].split(". ")[0]
    return RunError(
        f"rank {watchdog.rank} lost contact with another rank in step {watchdog.step + 1} ({reason}); "
        "see the line of the rank that ended first; the same command resumes from the last checkpoint"
    )


def collectives_begun():
    """The number of collectives that this process has started, over all its process groups."""
    total = 0
    for group in list(dist.distributed_c10d._world.pg_map):
        try:
            total += group._get_sequence_number_for_group()
        except (RuntimeError, AttributeError):
            continue  # the backend does not count collectives
    return total


def _store():
    """A separate connection to torchrun's store, because the main thread may block that of the process group."""
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
    return dist.PrefixStore("watchdog", rounds.current_store(store))


def _ranks(ranks):
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (", ..." if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
