# ruff: noqa: F401, F811 (fixtures are imported)
"""A disk that is full, read-only or gone: one line, with the last checkpoint and every row of metrics.csv intact."""

import errno
import os
import subprocess
import sys

import pytest

from maskalign.checkpoints.layout import complete_checkpoints, find_damage
from maskalign.errors import RunError, UsageError
from maskalign.runtime import files
from maskalign.runtime.files import replacing, write_atomically
from maskalign.training import logs, previews, run_log
from maskalign.training.event_file import EventFile
from maskalign.training.logs import MetricsFile, read_metrics
from tests.tiny_runs import command, data_set, run, train_with


def full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_cannot_be_written_leaves_what_there_was(tmp_path):
    path = tmp_path / "file.csv"
    write_atomically(path, b"before")
    with pytest.raises(OSError), replacing(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b"half of what")
        full()
    assert path.read_bytes() == b"before" and os.listdir(tmp_path) == ["file.csv"]


def row(step):
    return dict.fromkeys(logs.COLUMNS, 0.5) | {"step": step, "epoch": 0, "skipped_steps": 0, "bad_samples": 0}


def test_metrics_are_appended_to_and_cut_by_replacing(tmp_path, monkeypatch):
    path = tmp_path / "metrics.csv"
    file = MetricsFile(path, 0)
    for step in (1, 2, 3):
        file.write(row(step))
    file.close()
    whole = path.read_bytes()
    MetricsFile(path, 3).close()
    assert path.read_bytes() == whole
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(OSError):
            MetricsFile(path, 2)
    assert path.read_bytes() == whole
    # A fragment, as a full disk or two writers leave it, and bytes of a lost block.
    path.write_bytes(whole + b"4,0.5,0.")
    assert [found["step"] for found in read_metrics(path)] == [1, 2, 3]
    path.write_bytes(whole + b"\0" * 40 + b"\r\n\xff\xfe,1\r\n")
    MetricsFile(path, 9).close()
    assert path.read_bytes() == whole
    MetricsFile(path, 1).close()
    assert [found["step"] for found in read_metrics(path)] == [1]


@pytest.mark.parametrize("what", ["metrics", "samples", "curves", "tensorboard", "config", "lock", "evaluation"])
def test_a_full_disk_wherever_the_run_writes(run, tmp_path, monkeypatch, what):
    own = dict(training__checkpoint_every=2, training__tensorboard="true", training__sample_every=3)
    run(**own, training__max_steps=2)
    metrics = (tmp_path / "run" / "metrics.csv").read_bytes()
    if what == "evaluation":
        own |= dict(evaluate__every=3, evaluate__samples=0, evaluate__images=8)
        monkeypatch.setattr(run_log.history, "write_atomically", full)
    elif what == "lock":
        monkeypatch.setattr("maskalign.training.trainer.locked", full)
    elif what == "config":
        monkeypatch.setattr("maskalign.training.trainer.write_atomically", full)
    elif what == "samples":
        monkeypatch.setattr(previews, "replacing", full)
    elif what == "curves":
        monkeypatch.setattr(logs, "replacing", full)
    else:
        own_write = {"metrics": MetricsFile.write, "tensorboard": EventFile.add_scalar}[what]

        def until_three(self, *arguments):
            step = arguments[0]["step"] if what == "metrics" else arguments[2]
            return full() if step == 3 else own_write(self, *arguments)

        target = (MetricsFile, "write") if what == "metrics" else (EventFile, "add_scalar")
        monkeypatch.setattr(*target, until_three)
    with pytest.raises(RunError) as error:
        run(**own, curves=what == "curves", training__max_steps=4)
    message = str(error.value)
    assert "\n" not in message and "No space left on device" in message and "step_00000002 is the newest" in message
    assert "free space" in message
    (checkpoint,) = complete_checkpoints(tmp_path / "run")
    assert find_damage(checkpoint) is None
    assert (tmp_path / "run" / "metrics.csv").read_bytes().startswith(metrics)
    monkeypatch.undo()
    assert run(**own, training__max_steps=4)["step"] == 4
    assert [found["step"] for found in read_metrics(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4]


def mounted(folder, size):
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    return done.returncode == 0


def test_a_small_file_system_fills_up_while_a_run_resumes(command, tmp_path):
    """For real: nothing of the run is lost, and it ends in one line."""
    if not mounted(tmp_path / "small", "3m"):
        pytest.skip("needs root, to mount a file system")
    try:
        folder = tmp_path / "small" / "run"
        words = command("small/run", training__max_steps=2)
        train_with(words)
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        filler = tmp_path / "small" / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"0" * 4096)
        words[words.index("--training.max_steps") + 1] = "4"
        done = subprocess.run([sys.executable, "-m", "maskalign", "train", *words], capture_output=True, text=True)
        lines = [line for line in done.stderr.splitlines() if line.startswith("maskalign: ")]
        assert done.returncode == 1 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
        assert "No space left on device" in lines[0] and "step_00000002 is the newest" in lines[0]
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert after["metrics.csv"].startswith(before["metrics.csv"])
        (checkpoint,) = complete_checkpoints(folder)
        assert find_damage(checkpoint) is None
        filler.unlink()
        train_with(words, curves=True)
        assert [found["step"] for found in read_metrics(folder / "metrics.csv")] == [1, 2, 3, 4]
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_a_full_disk_ends_any_command_in_one_line(tmp_path, monkeypatch, capsys):
    from maskalign.cli import data_check, main

    monkeypatch.setattr(data_check, "run", lambda argv, start: full())
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", str(tmp_path)])
    err = capsys.readouterr().err
    assert ended.value.code == 1 and err.count("\n") == 1 and "No space left on device; free space" in err


def test_a_folder_that_is_read_only_is_a_users_mistake(run, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("maskalign.runtime.lock.os.open", refuse)
    with pytest.raises(UsageError, match="run_dir: .*cannot be written to .Permission denied"):
        run(training__max_steps=1)
