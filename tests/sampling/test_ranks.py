"""Several processes draw the very pictures of one, also after they were killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from maskalign.checkpoints.weight_files import reg_checkpoint, repa_checkpoint, write_repa

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.fixture
def checkpoint(random_model, tmp_path):
    model = random_model(patch_size=2, depth=2)
    write_repa(tmp_path / "model.pt", repa_checkpoint(model, model))
    return tmp_path / "model.pt"


@pytest.fixture
def reg_file(random_model, tmp_path):
    """A file in REG's layout: the model denoises a class token with its images."""
    model = random_model(patch_size=2, depth=2, class_dim=5, teacher_dims=(5,), projector_dim=8)
    write_repa(tmp_path / "reg.pt", reg_checkpoint(model, model))
    return tmp_path / "reg.pt"


def start(ranks, *words):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "maskalign", "sample", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("kind", ["checkpoint", "reg_file"])
def test_two_ranks_draw_the_bits_of_one(kind, request, tmp_path):
    words = [request.getfixturevalue(kind), "--steps", 3, "--batch-size", 2, "--sampler", "sde"]
    words += [*(["--cls-cfg-scale", 1.5] if kind == "reg_file" else []), "--out"]
    sheet = ["--per-class", 3, "--classes", "0,1,3", "--interpolate", "both", "--strip", "--animate", "apng"]
    for name, ranks in (("one", 1), ("two", 2)):
        finish(start(ranks, *words, tmp_path / name, "--npz", 7))
        out = finish(start(ranks, *words, tmp_path / name, *sheet))
        assert [line.rsplit("/")[-1] for line in out.split()] == [
            "grid.png", "interpolation.png", "strip.png", "denoising.png",
        ]  # fmt: skip
    one, two = (sorted(path for path in (tmp_path / name).rglob("*.*")) for name in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two] and len(one) == 9 + 6
    for a, b in zip(one, two, strict=True):
        if a.suffix == ".npz":  # the archive also holds the time
            assert np.array_equal(np.load(a)["arr_0"], np.load(b)["arr_0"])
        else:
            assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds torchrun's workers in /proc")
def test_killed_ranks_go_on_on_other_ranks(checkpoint, tmp_path):
    words = [checkpoint, "--steps", 2, "--batch-size", 2, "--npz", 600, "--out"]
    finish(start(1, *words, tmp_path / "whole"))
    done = tmp_path / "cut" / "samples_600.partial.done"
    killed = start(2, *words, tmp_path / "cut")
    try:
        deadline = time.time() + 240
        while time.time() < deadline and not (done.exists() and 0 < sum(done.read_bytes())):
            assert killed.poll() is None
            time.sleep(0.01)
    finally:
        # torchrun's workers have sessions of their own: they outlive it unless they are killed too.
        workers = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
        for pid in [killed.pid, *map(int, workers)]:
            os.kill(pid, signal.SIGKILL)
        killed.communicate()
    assert 0 < sum(done.read_bytes()) < 600 and not (tmp_path / "cut" / "samples_600.npz").exists()
    finish(start(1, *words, tmp_path / "cut"))
    whole, cut = (np.load(tmp_path / name / "samples_600.npz")["arr_0"] for name in ("whole", "cut"))
    assert np.array_equal(whole, cut)
