"""Run the tests that need a GPU, without the slow ones, and write a row of the CSV when each test ends."""

import argparse
import sys

import pytest

from benchmarks.gpu.rows import Rows

COLUMNS = ["test", "outcome", "seconds", "message"]
FOLDERS = ["tests/kernels", "tests/training/test_graphs.py"]


class Recorder:
    """A plugin of pytest that writes a row as each test ends."""

    def __init__(self, rows):
        self.rows = rows

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed" and report.when == "setup":
            message = "" if report.outcome == "passed" else str(report.longrepr).strip().splitlines()[-1][:300]
            self.rows.add(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.device_tests", description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(argv)
    rows = Rows(options.out, COLUMNS, rehearsal=int(options.rehearse))
    words = ["-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", *FOLDERS]
    return pytest.main(words, plugins=[Recorder(rows)])


if __name__ == "__main__":
    sys.exit(main())
