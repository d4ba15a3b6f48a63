"""A small data set, a run trained on it in a second, and a cache of references that no other test sees."""

import pytest
import torch

from maskalign.cli import main
from tests.tiny_runs import train_on, write_data_set


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder in which references of this test are kept."""
    monkeypatch.setenv("MASKALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A data set: 48 pictures of 16x16 in three classes, with features."""
    folder = tmp_path_factory.mktemp("evaluation") / "data"
    write_data_set(folder)
    return folder


@pytest.fixture(scope="session")
def run(data):
    """A run folder with checkpoints of steps 1 and 2."""
    run_dir = data.parent / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    train_on(data, run_dir, training__max_steps=2, training__checkpoint_every=1)
    torch.set_num_threads(before)
    return run_dir


@pytest.fixture
def command(capfd):
    """Runs a command in this process: (exit status, standard output, lines of standard error)."""

    def go(*words):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        out, err = capfd.readouterr()
        return end.value.code, out, err.strip().splitlines()

    return go
