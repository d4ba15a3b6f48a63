"""Run every file that is called test_interpreted*.py, and those of both paths, with TRITON_INTERPRET=1."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
FILES = [FOLDER / "test_transforms.py", *FOLDER.rglob("test_interpreted*.py")]
SLOW = {"test_interpreted_rehearsal.py"}  # the benchmark and the gpu tests; the other files test the kernels


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this session runs the files itself")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(file, marks=pytest.mark.slow if file in SLOW else ())
        for file in sorted(str(path.relative_to(FOLDER)) for path in FILES)
    ],
)
def test_kernels_in_the_interpreter(file):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
