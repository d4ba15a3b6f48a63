"""Weights & Biases as a logger, offline: what a run sends, that a resumed run continues it, and what is refused."""

import json

import pytest

from maskalign.config import parse_config
from maskalign.errors import UsageError
from maskalign.training.wandb_log import FILE_NAME, check_wandb

BASE = ["--model.preset", "SiT-S/2"]


@pytest.mark.parametrize(
    "argv, loggers",
    [
        ([], ["tensorboard"]),
        (["--training.loggers", "wandb"], ["wandb"]),
        (["--training.loggers", "[tensorboard, wandb]"], ["tensorboard", "wandb"]),
        (["--training.loggers", "tensorboard,wandb", "--training.tensorboard", "false"], ["wandb"]),
        (["--training.loggers", "[]"], []),
        (["--training.tensorboard", "false"], []),
    ],
)
def test_the_setting(argv, loggers):
    assert parse_config([*BASE, *argv]).training.loggers == loggers


def test_an_unknown_logger():
    with pytest.raises(UsageError, match="training.loggers: mlflow is not one of tensorboard, wandb"):
        parse_config([*BASE, "--training.loggers", "mlflow"])


def test_without_a_key_it_is_one_line(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no API key; run wandb login, or set WANDB_MODE=offline"):
        check_wandb()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password x\n")
    check_wandb()


class FakeRun:
    """What a W&B run is told."""

    def __init__(self, **settings):
        self.settings, self.rows, self.finished = settings, [], False

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


def test_a_run_is_logged_and_continued(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    runs = []
    monkeypatch.setattr(wandb, "init", lambda **settings: runs.append(FakeRun(**settings)) or runs[-1])
    folder = tmp_path / "mine"
    own = {"training__loggers": "wandb", "training__log_every": 1, "training__sample_every": 2}
    for steps in (2, 4):
        run("mine", **own, training__max_steps=steps, training__checkpoint_every=2)
    first, second = runs
    identity = json.loads((folder / FILE_NAME).read_text())["id"]
    assert first.settings["id"] == second.settings["id"] == identity and second.settings["resume"] == "allow"
    assert first.settings["name"] == "mine" and first.settings["config"]["training"]["max_steps"] == 2
    numbers = [row["step"] for row in [*first.rows, *second.rows] if "train/loss" in row]
    assert numbers == [1, 2, 3, 4] and first.finished and second.finished
    pictures = [row for row in [*first.rows, *second.rows] if "samples" in row]
    assert {row["step"] for row in pictures} == {2, 4}
    assert all(isinstance(row["samples"], wandb.Image) for row in pictures)


@pytest.mark.slow
def test_the_package_writes_offline_files(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    import numpy as np

    from maskalign.training.wandb_log import WandbLog

    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        log = WandbLog(tmp_path, {"seed": 0})
        log.add_scalars({"train/loss": 0.5}, step)
        log.add_image("samples", np.zeros((8, 8, 3), dtype=np.uint8), step)
        log.close()
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tmp_path / FILE_NAME).read_text())["id"]
    assert files and all(identity in path.name and path.stat().st_size > 0 for path in files)
