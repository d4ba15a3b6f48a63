# ruff: noqa: F401, F811 (fixtures are imported)
"""training.compile on a machine that cannot compile: one line, before a model is built."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from maskalign.errors import UsageError
from maskalign.training import compiling, trainer
from tests.tiny_runs import command, data_set, run


def environment(tmp_path, compiler):
    """A PATH without a C++ compiler, or with one that does not work; and no caches of torch."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "uname", "env"):
        os.symlink(shutil.which(name), tools / name)
    if compiler == "broken":
        (tools / "g++").write_text(
            '#!/bin/sh\n[ "$1" = --version ] && echo "g++ 12" && exit 0\necho no headers >&2; exit 1\n'
        )
        (tools / "g++").chmod(0o755)
    own = {key: value for key, value in os.environ.items() if key not in ("CXX", "CC")}
    return own | {"PATH": str(tools), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}


@pytest.mark.parametrize("compiler", ["missing", "broken"])
def test_on_a_cpu_without_a_compiler_that_works(command, tmp_path, compiler):
    argv = [sys.executable, "-m", "maskalign", "train", *command(training__compile="true", training__device="cpu")]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(tmp_path, compiler))
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("maskalign: ")]
    assert len(lines) == 1 and "training.compile: " in lines[0] and "C++ compiler" in lines[0]
    assert "set training.compile false" in lines[0]
    assert not (tmp_path / "run").exists() and "parameters" not in done.stdout


def test_on_a_gpu_without_triton(monkeypatch):
    class Missing(Exception):
        pass

    def fail(*arguments, **keywords):
        def call(x):
            try:
                raise Missing("Cannot find a working triton installation")
            except Missing as error:
                raise RuntimeError("backend='inductor' raised") from error

        return call

    monkeypatch.setattr(torch, "compile", fail)
    monkeypatch.setattr(torch, "ones", lambda *arguments, **keywords: None)
    with pytest.raises(UsageError, match="on cuda here .Missing: Cannot find a working triton.* it needs Triton and"):
        compiling.check_compile(torch.device("cuda"))


def test_it_is_found_before_a_model_is_built(run, monkeypatch):
    def refuse(device):
        raise UsageError("training.compile: not here")

    monkeypatch.setattr(trainer, "check_compile", refuse)
    monkeypatch.setattr(trainer, "build_model", lambda *arguments: pytest.fail("the model was built"))
    with pytest.raises(UsageError, match="not here"):
        run(training__compile="true")


def test_without_compile_nobody_asks_for_a_compiler(command, tmp_path):
    argv = [sys.executable, "-m", "maskalign", "train", *command(training__max_steps=1)]
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(tmp_path, "missing"))
    assert done.returncode == 0, done.stderr
