"""The work of `maskalign report`."""

import time
from pathlib import Path

from maskalign.errors import RunError, UsageError
from maskalign.reporting.page import render
from maskalign.reporting.run import names_of, read_run
from maskalign.runtime.files import write_atomically
from maskalign.runtime.outputs import check_file


def report(runs, out, title=None):
    """Write an HTML page that compares runs.

    Args:
        runs: run folders, one or more.
        out: the HTML file to write.
        title: heading of the page; by default the name of the run, or the number of runs.

    Returns:
        (path, notes): the file, and a list of lines about parts that could not be read.

    Raises:
        UsageError: a folder is not a run, a run is given twice, or `out` is a folder.
        RunError: the file cannot be written.
    """
    out, folders = check_file(out), [Path(run).resolve() for run in runs]
    twice = next((run for number, run in enumerate(runs) if folders.index(folders[number]) != number), None)
    if twice is not None:
        raise UsageError(f"{twice}: is given twice; name each run once")
    read = [read_run(path, name) for path, name in zip(runs, names_of(runs), strict=True)]
    title = title or (f"{read[0].name}" if len(read) == 1 else f"{len(read)} runs compared")
    page = render(read, title, made=time.strftime("%Y-%m-%d %H:%M"))
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise RunError(f"cannot write {out} ({error.strerror or error}); choose another --out") from None
    return out, [f"{run.path}: {note}" for run in read for note in run.notes]
