# ruff: noqa: F401, F811 (fixtures are imported)
"""One writer per folder, and every folder for one purpose."""

import os
import signal
import subprocess
import sys
import time

import pytest

from maskalign.checkpoints.layout import complete_checkpoints
from maskalign.cli import main
from maskalign.data.build import build, encode
from maskalign.errors import UsageError
from maskalign.runtime import lock as lock_module
from maskalign.runtime.lock import NAME, locked
from maskalign.training.logs import read_metrics
from tests.on_disk import random_pictures, write_pictures
from tests.tiny_runs import command, data_set, data_set_of, run

HOLD = """
import os, sys, time
from maskalign.runtime.lock import locked
with locked(sys.argv[1], "maskalign train", "run_dir"):
    if len(sys.argv) > 2 and os.fork() == 0:
        time.sleep(30)  # longer than the test, which kills its parent
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


def hold(folder, *words):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), *words], stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline()) == process.pid
    return process


def test_a_second_one_is_told_who_is_at_work(tmp_path):
    process = hold(tmp_path / "run")
    try:
        with pytest.raises(UsageError) as error, locked(tmp_path / "run", "maskalign train", "run_dir", patience=0.2):
            pass
        message = str(error.value)
        assert f"process {process.pid} on {os.uname().nodename}" in message and "\n" not in message
        assert message.startswith("run_dir: ") and "maskalign train" in message
    finally:
        process.kill()
        process.wait()
    # A killed process leaves a file, which locks nothing.
    assert (tmp_path / "run" / NAME).exists()
    with locked(tmp_path / "run", "maskalign train"):
        assert (tmp_path / "run" / NAME).exists()
    assert not (tmp_path / "run").exists()  # it was empty


def test_forked_children_of_a_killed_process_do_not_keep_its_lock(tmp_path):
    process = hold(tmp_path / "run", "fork")
    process.kill()
    process.wait()
    with locked(tmp_path / "run", "maskalign train", patience=2):
        pass


def test_who_waits_for_the_lock_gets_it_when_it_is_free(tmp_path):
    script = HOLD.replace("time.sleep(600)", "time.sleep(1)")
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with locked(tmp_path, "maskalign train", patience=20):
        assert (tmp_path / NAME).exists()
    process.wait()


def test_a_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def refuse(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock_module.fcntl, "flock", refuse)
    with locked(tmp_path, "maskalign train"):
        pass
    assert "has no locks" in capsys.readouterr().err


def test_two_trainings_in_one_folder(command, run, tmp_path):
    argv = command(training__max_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, "-m", "maskalign", "train", *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    metrics = tmp_path / "run" / "metrics.csv"
    try:
        end = time.monotonic() + 120
        while not (metrics.exists() and len(read_metrics(metrics)) >= 2):
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        with pytest.raises(UsageError, match=f"run_dir: .*in use by maskalign train .process {process.pid} on "):
            run(training__max_steps=3)
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    # The killed one goes on from its last checkpoint, or from the beginning.
    steps = 100 + max([0, *(int(path.name[5:]) for path in complete_checkpoints(tmp_path / "run"))])
    assert run(training__max_steps=steps)["step"] == steps
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, steps + 1))


def test_two_builds_and_an_encode_into_one_folder(tmp_path, data_set):
    write_pictures(tmp_path / "pictures" / "ant", random_pictures(12))
    for folder, work in (
        (tmp_path / "built", lambda: build(str(tmp_path / "pictures"), tmp_path / "built", size=8, quiet=True)),
        (data_set, lambda: encode(data_set, teacher="efficientnet-lite0", weights="random", quiet=True)),
    ):
        with locked(folder, "maskalign data build"), pytest.raises(UsageError, match="in use by maskalign data build"):
            work()
    assert not (tmp_path / "built").exists()
    build(str(tmp_path / "pictures"), tmp_path / "built", size=8, quiet=True)
    assert not (tmp_path / "built" / NAME).exists()


def one_line(capsys, argv):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in argv])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1, err
    return err


def test_a_folder_is_a_run_or_a_data_set(command, run, data_set, tmp_path, capsys):
    run(training__max_steps=1)
    write_pictures(tmp_path / "pictures" / "ant", random_pictures(3))
    capsys.readouterr()
    err = one_line(capsys, ["data", "build", tmp_path / "pictures", "--out", tmp_path / "run"])
    assert "is the folder of a run" in err
    teacher = ["--teacher", "efficientnet-lite0", "--weights", "random"]
    err = one_line(capsys, ["data", "encode", "--data", data_set, "--out", tmp_path / "run", *teacher])
    assert "is the folder of a run" in err
    argv = command(training__max_steps=2)
    argv[argv.index("--run_dir") + 1] = str(data_set)
    assert "run_dir" in (err := one_line(capsys, ["train", *argv])) and "is the folder of a data set" in err
    err = one_line(capsys, ["sample", tmp_path / "run", "--out", data_set])
    assert "--out" in err and "is a data set" in err


def test_an_evaluation_with_other_classes_of_equal_number(run, data_set, tmp_path, capsys):
    from maskalign.data.format.manifest import Manifest

    run(training__max_steps=1)
    manifest = Manifest.load(data_set)
    for names, what in ((["x", "y", "z"], "label 0 is 'ant' and 'x'"), (["cat", "bee", "ant"], "in another order")):
        manifest.class_names = names
        manifest.save(data_set)
        capsys.readouterr()
        err = one_line(capsys, ["evaluate", tmp_path / "run", "--data", data_set, "--metrics", "none"])
        assert "other classes" in err and what in err
