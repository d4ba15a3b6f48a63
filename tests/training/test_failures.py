"""Runs on several ranks that are told to stop, that hang, that lose a rank: one line, and no step lost or redone."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskalign.checkpoints.layout import complete_checkpoints, read_state
from maskalign.training.failures import REQUEUE, Stop
from maskalign.training.logs import read_metrics

pytestmark = pytest.mark.distributed
FAULTS = Path(__file__).with_name("train_with_faults.py")
ROOT = Path(__file__).resolve().parents[2]


def launch(fault, argv, ranks=2, options=()):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]
    return subprocess.Popen(
        [*torchrun, str(FAULTS), *(str(word) for word in fault), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_rows(path, count, process, timeout=200):
    end = time.time() + timeout
    while time.time() < end and process.poll() is None:
        if path.exists() and len(read_metrics(path)) >= count:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {count} rows: {process.communicate()}")


def workers(process):
    """Process ids of torchrun's ranks."""
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout
    return [int(pid) for pid in listed.split()]


def our_lines(text):
    return [line for line in text.splitlines() if line.startswith("maskalign: ")]


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_metrics(run_dir / "metrics.csv")}


@pytest.mark.slow
def test_a_killed_rank_is_started_again_from_the_last_checkpoint(command, run, tmp_path):
    own = dict(training__max_steps=8, training__checkpoint_every=2)
    run("whole", **own)
    argv = command("killed", **own, parallel__plan="fsdp")
    process = launch(("kill", 1, 5), argv, options=["--max-restarts=1"])
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    assert "Traceback" not in "".join(our_lines(err))
    whole, killed = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    assert all(killed[step] == pytest.approx(whole[step], rel=1e-5) for step in whole)


@pytest.mark.parametrize("fault", ["hang", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_hung_rank_ends_the_run_with_its_number_and_the_step(command, tmp_path, fault):
    argv = command(training__max_steps=8, training__checkpoint_every=2, training__timeout=4, parallel__plan="ddp")
    process = launch((fault, 1, 5), argv, options=["--shutdown-timeout=2"])
    start = time.time()
    out, err = process.communicate(timeout=200)
    assert process.returncode == 1 and time.time() - start < 120
    lines = our_lines(err)
    assert len(lines) == 1, err[-3000:]
    assert re.search(r"failed: rank 1 .* in step 6", lines[0]) and "training.timeout 4 s" in lines[0]
    if fault == "hang":
        assert "train_with_faults.py" in lines[0]  # where it hangs
    # A stopped process also stops writing the checkpoint of step 4, if it was still in the background.
    steps = [4] if fault == "hang" else [2, 4]
    assert complete_checkpoints(tmp_path / "run")[-1].name in {f"step_{step:08d}" for step in steps}


def test_what_one_rank_alone_meets_is_told_and_the_others_follow(command, tmp_path):
    argv = command(training__max_steps=8, parallel__plan="ddp")
    process = launch(("fail", 1, 3), argv, options=["--shutdown-timeout=5"])
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1
    assert "maskalign: failed (rank 1): a fault of rank 1" in err
    for line in our_lines(err):
        assert "a fault of rank 1" in line or ("rank 0 lost contact with another rank in step 4" in line), line


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_at_one_step_with_a_marker(command, run, tmp_path, number):
    changes = dict(training__checkpoint_every=1000)
    argv = command(**changes, training__max_steps=100_000, parallel__plan="ddp")
    process = launch(("slow", 0, 0), argv)
    wait_for_rows(tmp_path / "run" / "metrics.csv", 3, process)
    os.kill(max(workers(process)), number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err[-3000:]
    assert "stopped at step" in out
    newest = complete_checkpoints(tmp_path / "run")[-1]
    step = read_state(newest)["step"]
    assert losses(tmp_path / "run").keys() == set(range(1, step + 1))
    assert (tmp_path / "run" / REQUEUE).read_text().startswith(f"stopped and saved at step {step}")
    run(**changes, training__max_steps=step + 2)  # on one rank
    assert not (tmp_path / "run" / REQUEUE).exists()
    run("whole", **changes, training__max_steps=step + 2)
    whole, stopped = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert all(stopped[at] == pytest.approx(whole[at], rel=1e-4) for at in whole)


def test_the_signal_that_slurm_sends_to_torchrun_reaches_the_ranks(command, tmp_path):
    argv = command(training__max_steps=100_000, parallel__plan="ddp")
    process = launch(("slow", 0, 0), argv, options=["--signals-to-handle=SIGTERM,SIGUSR1"])
    wait_for_rows(tmp_path / "run" / "metrics.csv", 3, process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=100)
    assert (tmp_path / "run" / REQUEUE).exists()
    assert complete_checkpoints(tmp_path / "run")


def test_a_second_signal_changes_nothing_but_a_second_ctrl_c():
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # torchrun passes on what the terminal has sent to everybody
        assert stop.agree() and stop.agreed == signal.SIGTERM and stop.wants_requeue
        stop.since -= 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with Stop() as stop:
        assert not stop.agree()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.agree() and not stop.wants_requeue
