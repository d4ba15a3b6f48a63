"""evaluation.csv of a run: one row per evaluation during training, with the names of evaluation.json as columns."""

import csv
import io
from pathlib import Path

from maskalign.runtime.files import write_atomically

FILE_NAME = "evaluation.csv"


def read_history(path):
    """Rows of an evaluation.csv as dicts of numbers, without empty cells; [] if the file does not exist."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows]


def write_history(path, rows):
    """Write all rows atomically, with a column for every key of any row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in rows)
    write_atomically(str(path), text.getvalue().encode())


def add_to_history(path, row):
    """Add a row; older rows of the same and later steps, from before the run was resumed, are removed."""
    write_history(path, [*(old for old in read_history(path) if old["step"] < row["step"]), row])


def drop_after(path, step):
    """Remove the rows after `step`, because a run that resumes from this step measures them again."""
    rows = read_history(path)
    kept = [row for row in rows if row["step"] <= step]
    if kept:
        if len(kept) < len(rows):
            write_history(path, kept)
    else:
        Path(path).unlink(missing_ok=True)
