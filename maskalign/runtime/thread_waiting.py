"""Choose how OpenMP's threads wait on a machine that other processes use too. Must run before torch loads OpenMP.

OpenMP's threads spin while they wait for each other, which is fastest if no other process is busy. If other processes
use the same processors, the spinning threads delay the thread that they wait for. On two cores with two other busy
processes, a step of the quickstart took ten times as long as with threads that sleep. Without other processes, sleeping
makes a step a third slower.
"""

import os
import sys
import time
from typing import NamedTuple

SHARE = 0.25  # if other processes use more than this share of the processors, sleeping is better
LEAST_SECONDS = 0.2  # minimum time between readings; the kernel counts hundredths of a second
OWN_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Reading(NamedTuple):
    """Times in seconds: clock: monotonic clock; busy: busy time of the processors that this process may use, all
    processes together; own: processor time of this process. processors: number of these processors.
    """

    clock: float
    busy: float
    own: float
    processors: int


def look(path="/proc/stat"):
    """The current `Reading`; None if the system does not provide it."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open(path) as file:
            rows = [line.split() for line in file if line.split(" ", 1)[0] in allowed]
        # user, nice, system, idle, iowait, irq, softirq, steal; the time of guests is included in `user`.
        ticks = sum(sum(map(int, row[1:9])) - int(row[4]) - int(row[5]) for row in rows)
        return Reading(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time(), len(rows))
    except (OSError, ValueError, AttributeError, IndexError):
        return None


def share_of_others(before, after):
    """Share of the processors that other processes used between two readings, from 0 to 1."""
    seconds = (after.clock - before.clock) * after.processors
    others = after.busy - before.busy - (after.own - before.own)
    return min(1.0, max(0.0, others / seconds)) if seconds > 0 else 0.0


def make_room(before):
    """Make OpenMP's threads sleep while they wait, if other processes have been busy since the reading `before`.

    Nothing is changed if the user has set a policy, if torch is loaded already, or under torchrun, because the other
    ranks would count as other processes.
    """
    chosen = any(name in os.environ for name in OWN_CHOICE)
    if before is None or chosen or "torch" in sys.modules or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - before.clock)))
    after = look()
    if after is not None and share_of_others(before, after) > SHARE:
        os.environ["OMP_WAIT_POLICY"] = "passive"
