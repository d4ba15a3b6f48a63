"""How OpenMP's threads wait on a machine that other processes use too; set before torch loads OpenMP.

OpenMP's threads spin while they wait for each other, which is fastest where they are alone. Where other processes want
the same processors, the spinning threads hold up the one that they wait for: on two cores with two other busy processes
a step of the quickstart took ten times as long as with threads that sleep. Alone, sleeping would cost a third.
"""

import os
import sys
import time
from typing import NamedTuple

SHARE = 0.25  # share of the processors in use by others above which sleeping is better
LEAST_SECONDS = 0.2  # between readings; the kernel counts hundredths of a second
OWN_CHOICE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


class Reading(NamedTuple):
    """Seconds since some moment: of the clock, busy ones of this process's processors, and its own on them."""

    clock: float
    busy: float
    own: float
    processors: int


def look(path="/proc/stat"):
    """A `Reading` of now; None where the system does not tell."""
    try:
        allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open(path) as file:
            rows = [line.split() for line in file if line.split(" ", 1)[0] in allowed]
        # user, nice, system, idle, iowait, irq, softirq, steal; what guests use is in `user` already.
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
    """Have OpenMP's threads sleep while they wait if others have been busy since the reading `before`.

    Nothing is changed where the user has chosen, where torch is loaded already, or under torchrun, whose ranks are each
    other's neighbors.
    """
    chosen = any(name in os.environ for name in OWN_CHOICE)
    if before is None or chosen or "torch" in sys.modules or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    time.sleep(max(0.0, LEAST_SECONDS - (time.monotonic() - before.clock)))
    after = look()
    if after is not None and share_of_others(before, after) > SHARE:
        os.environ["OMP_WAIT_POLICY"] = "passive"
