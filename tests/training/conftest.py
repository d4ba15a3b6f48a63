"""Runs under torchrun, beside those of tests/tiny_runs.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_runs import command, data_set, data_set_of, run  # noqa: F401


@pytest.fixture
def launch(command, tmp_path):  # noqa: F811
    """Trains several runs in one torchrun: (processes, {name: settings}, what else runs_under_torchrun.py takes)."""
    launched = Path(__file__).with_name("runs_under_torchrun.py")

    def go(processes, cases, **own):
        file = tmp_path / "cases.json"
        own = {"backend": "aot_eager", **own}
        file.write_text(json.dumps([{"argv": command(name, **changes), **own} for name, changes in cases.items()]))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*torchrun, str(launched), str(file)],
            capture_output=True,
            text=True,
            env=environment,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-9000:]

    return go
