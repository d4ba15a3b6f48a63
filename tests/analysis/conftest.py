"""A tiny model, a small data set written with the standard library alone, and runs trained on it in seconds."""

import pytest
import torch

from maskalign.models import SiT
from tests.tiny_runs import train_on, write_data_set


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture
def make_model():
    """Makes a small float64 `SiT` with weights that are nowhere zero; settings override."""

    def make(seed=0, **settings):
        sizes = dict(
            input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=3, width=16, heads=2, teacher_dims=(5,),
            align_depth=2, projector_dim=8, mixer="token_mlp", mixer_hidden=6,
        )  # fmt: skip
        model = SiT(**{**sizes, **settings})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model.double().eval()

    return make


def make_data_set(folder, samples=24, **settings):
    """Write a data set of shards of 8 samples; `settings` are those of `write_data_set`. Returns the folder."""
    write_data_set(folder, samples, shard_size=8, **settings)
    return folder


def train_run(data, run_dir, **changes):
    """Train a tiny model; `changes` by setting with dots written as double underscores. Returns run_dir."""
    own = dict(
        model__depth=3,
        method__align_depth=2,
        optimizer__lr=0.01,
        training__max_steps=4,
        training__checkpoint_every=2,
        preview__per_class=1,
        preview__steps=1,
    )
    train_on(data, run_dir, **own | changes)
    return run_dir


@pytest.fixture(scope="session")
def make_data():
    """Writes a data set: (folder, settings of `write_data_set`)."""
    return make_data_set


@pytest.fixture(scope="session")
def make_run():
    """Trains a run: (data set, folder, settings)."""
    return train_run


@pytest.fixture(scope="session")
def data_set(tmp_path_factory):
    return make_data_set(tmp_path_factory.mktemp("analysis") / "data")


@pytest.fixture(scope="session")
def masked_run(data_set, tmp_path_factory):
    """Two checkpoints of a run on subsets of 8 of 16 tokens."""
    return train_run(data_set, tmp_path_factory.mktemp("analysis") / "masked")


@pytest.fixture(scope="session")
def full_run(data_set, tmp_path_factory):
    """Two checkpoints of REPA: all tokens, no mixer."""
    folder = tmp_path_factory.mktemp("analysis") / "full"
    return train_run(data_set, folder, method__keep_ratio=1, model__mixer="none")
