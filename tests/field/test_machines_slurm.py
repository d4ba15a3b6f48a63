"""Two Slurm jobs on one node."""

import os
import subprocess

import pytest

from tests.slurm import CONFIG, FAKES, SCRIPTS


def endpoint(script, folder, job, **environment):
    """Host and port at which a job's ranks would meet."""
    folder.mkdir()
    for name, body in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_ID": str(job), "CODE": "0"}
    own = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder), "RUN": str(folder), "MARK": ""}
    subprocess.run(
        ["bash", str(script), str(CONFIG), str(folder / "run")], env=os.environ | slurm | own | environment, check=True
    )
    (line,) = [word for word in (folder / "srun-words").read_text().splitlines() if word.startswith("--rdzv-endpoint=")]
    host, _, port = line.partition("=")[2].partition(":")
    return host, int(port)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_two_jobs_on_one_node_meet_at_different_ports(script, tmp_path):
    jobs = [7, 8, 123456, 123457, 99999999]
    ports = [endpoint(script, tmp_path / str(job), job)[1] for job in jobs]
    assert len(set(ports)) == len(ports)
    # Below 1024 is for root, and from 32768 on the system gives ports to whoever asks.
    assert all(1024 <= port < 32768 for port in ports)
    assert endpoint(script, tmp_path / "given", 7, MASTER_PORT="4321")[1] == 4321
