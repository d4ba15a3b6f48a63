"""Write the rows of a CSV one by one, so that an interrupted part loses no row."""

import csv
from pathlib import Path


class Rows:
    """A CSV with a header, to which `add` appends and flushes a row.

    Args:
        path: path of the file, which is overwritten.
        columns: names of the columns, in order; a row may omit some.
        always: columns with the same value in every row.
    """

    def __init__(self, path, columns, **always):
        self.columns, self.always = [*columns, *always], always
        self.path, self.count = Path(path), 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(self.columns)

    def add(self, **row):
        unknown = set(row) - set(self.columns)
        assert not unknown, unknown
        values = [({**row, **self.always}).get(column) for column in self.columns]
        with open(self.path, "a", newline="") as file:
            texts = [f"{v:.6g}" if isinstance(v, float) else "" if v is None else v for v in values]
            csv.writer(file, lineterminator="\n").writerow(texts)
        self.count += 1


def count_rows(path):
    """The number of rows of a CSV without its header; 0 if there is no file."""
    if not Path(path).is_file():
        return 0
    with open(path, newline="") as file:
        return max(0, sum(1 for _ in csv.reader(file)) - 1)
