"""Run the parts of a measurement one after the other, each in a process with its own share of the time."""

import os
import signal
import subprocess
import time
from typing import List, NamedTuple

from benchmarks.gpu.rows import Rows, count_rows

COLUMNS = ["part", "status", "seconds", "seconds_given", "rows", "note", "command"]
GRACE = 5.0  # seconds between asking a process to end and killing it


class Part(NamedTuple):
    """One part, which is a process.

    name: name of the part; words: its command; file: name of the CSV that it writes in the folder of the results;
    share: share of the time, relative to the shares of the parts after it; least: minimum of seconds left to start it.
    """

    name: str
    words: List[str]
    file: str
    share: float = 1.0
    least: float = 0.0


def run_process(words, seconds):
    """Run a command for at most some seconds.

    Returns:
        (status, last line of its output): the exit status, or None if it was stopped.
    """
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        stopped = False
    except subprocess.TimeoutExpired:
        output, stopped = _end(process), True
    except BaseException:
        _end(process)
        raise
    print(output, flush=True)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return None if stopped else process.returncode, lines[-1] if lines else ""


def _end(process):
    """End the process and those that it started, and return what it wrote."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)  # the group is this process's own: see start_new_session
        except ProcessLookupError:
            pass
        try:
            return process.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            continue
    return ""


def run_parts(parts, seconds, folder, run=run_process, now=time.monotonic, **always):
    """Run the parts in order, within the time, and write gpu-parts.csv as each one ends.

    The remaining time is divided by the shares of the remaining parts, so the time that a part does not use goes to the
    later parts. A part that fails or is stopped keeps the rows that it has written, and does not affect the others.

    Args:
        parts: list of `Part`.
        seconds: time for all parts together.
        folder: `Path` of the results.
        run: function (words, seconds) -> (exit status or None for stopped, last line).
        now: clock, seconds.
        always: columns that are the same in every row.

    Returns:
        list of dicts with COLUMNS; status is `done`, `failed`, `stopped` (out of time) or `did not fit`.
    """
    end = now() + seconds
    table, outcomes = Rows(folder / "gpu-parts.csv", COLUMNS, **always), []
    for number, part in enumerate(parts):
        left = max(0.0, end - now())
        given = left * part.share / sum(other.share for other in parts[number:])
        path = folder / part.file
        path.unlink(missing_ok=True)  # from an earlier run
        row = {"part": part.name, "seconds_given": given, "command": " ".join(part.words[1:])}
        if given < max(part.least, 1e-9):
            row |= {"status": "did not fit", "seconds": 0.0, "rows": 0}
            row["note"] = f"needs {part.least:.0f} s, {given:.0f} s were left for it"
        else:
            print(f"--- {part.name}: at most {given:.0f} s of {left:.0f} s left", flush=True)
            start = now()
            try:
                status, line = run(part.words, given)
            except OSError as error:
                status, line = 1, str(error)
            words = {0: "done", None: "stopped"}.get(status, "failed")
            row |= {"status": words, "seconds": now() - start, "rows": count_rows(path)}
            row["note"] = line[:300] if words == "failed" else "out of time" if words == "stopped" else ""
        table.add(**row)
        outcomes.append(row)
        print(f"--- {part.name}: {row['status']} after {row['seconds']:.0f} s, {row['rows']} rows {row['note']}")
    return outcomes
