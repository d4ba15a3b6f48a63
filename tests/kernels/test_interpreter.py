"""Run every file that is called test_interpreted*.py, and those of both paths, with TRITON_INTERPRET=1."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent
REHEARSAL = FOLDER / "test_interpreted_rehearsal.py"
KERNELS = [FOLDER / "test_transforms.py", *sorted({*FOLDER.rglob("test_interpreted*.py")} - {REHEARSAL})]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this session runs the files itself")
@pytest.mark.parametrize(
    "files",
    [
        pytest.param(KERNELS, id="the kernels"),
        pytest.param([REHEARSAL], id="the benchmark and the gpu tests", marks=pytest.mark.slow),
    ],
)
def test_in_the_interpreter(files):
    """In one process: starting it, and what torch.compile and opcheck import, takes as long as the tests of a file."""
    assert all(file.is_file() for file in files) and files
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=800,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
