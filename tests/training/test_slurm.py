"""The job scripts: the shell takes them, and so does maskalign's parser every setting in them."""

import os
import re
import shlex
import subprocess

import pytest

from maskalign.config import parse_config
from tests.slurm import CONFIG, FAKES, SCRIPTS


def submit(script, tmp_path, code=0, mark=""):
    for name, body in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    slurm = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "77"}
    own = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path), "RUN": str(run_dir)}
    return subprocess.run(
        ["bash", str(script), str(CONFIG), str(run_dir), "--seed", "3"],
        env=os.environ | slurm | own | {"CODE": str(code), "MARK": mark},
        capture_output=True,
        text=True,
    )


def test_there_is_a_script():
    assert SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_shell_and_the_parsers_take_it(script, tmp_path):
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", script.read_text(), re.M)
    done = submit(script, tmp_path)
    assert done.returncode == 0, done.stderr
    words = (tmp_path / "srun-words").read_text().splitlines()
    start = words.index("torchrun")
    split = words.index("-m")
    from torch.distributed.run import get_args_parser

    launcher = get_args_parser().parse_args([*words[start + 1 : split], "script.py"])
    assert launcher.nnodes == "2" and launcher.rdzv_endpoint.startswith("node1:")
    assert "SIGUSR1" in launcher.signals_to_handle
    assert words[split : split + 3] == ["-m", "maskalign", "train"]
    config = parse_config(words[split + 3 :])
    assert config.seed == 3 and config.run_dir == str(tmp_path / "run") and config.training.resume == "auto"
    seconds = int(re.search(r"--signal=USR1@(\d+)", script.read_text()).group(1))
    assert launcher.shutdown_timeout < seconds


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_an_interrupted_job_is_queued_again_and_no_other(script, tmp_path):
    assert submit(script, tmp_path, code=3).returncode == 3
    assert not (tmp_path / "requeued").exists()
    assert submit(script, tmp_path, code=1, mark="yes").returncode == 0
    assert shlex.split((tmp_path / "requeued").read_text()) == ["requeue", "77"]
