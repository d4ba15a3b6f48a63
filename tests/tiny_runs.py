"""A small data set on disk, written with the standard library alone, and runs that train on it in seconds."""

import hashlib
import io
import tarfile
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
from PIL import Image

from maskalign.config import parse_config
from maskalign.data.format.manifest import Manifest, Shard

TEACHER = "efficientnet-lite0"


def write_data_set(
    folder,
    samples=48,
    shard_size=12,
    size=16,
    grid=(4, 4),
    dim=6,
    features=True,
    latent=False,
    class_token=False,
    seed=0,
):
    """Write random images of three classes, with int8 features, class tokens and latents; returns the sorted keys.

    Args:
        folder: where to write; must not exist. size: of the images in pixels. grid, dim: of the features.
    """
    rng, class_rng = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    folder.mkdir(parents=True)
    shards, keys = [], []
    for first in range(0, samples, shard_size):
        path = folder / f"shard-{first // shard_size:06d}.tar"
        count = min(shard_size, samples - first)
        with tarfile.open(path, "w") as tar:
            for number in range(first, first + count):
                key = f"{number:08d}"
                keys.append(key)
                image = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(image, "png")
                members = {"cls": str(number % 3).encode(), "png": image.getvalue()}
                if features:
                    members[f"{TEACHER}.npy"] = _npy(rng.integers(-127, 128, (grid[0] * grid[1], dim), dtype=np.int8))
                if class_token:
                    members[f"{TEACHER}.class.npy"] = _npy(class_rng.normal(size=dim).astype(np.float16))
                if latent:
                    moments = np.abs(rng.normal(size=(8, size // 2, size // 2)))
                    members["moments.npy"] = _npy(moments.astype(np.float16))
                for name, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = path.read_bytes()
        shards.append(Shard(path.name, count, len(data), hashlib.sha256(data).hexdigest()))
    teacher = dict(tokens=grid[0] * grid[1], dim=dim, grid=list(grid), dtype="int8", normalize="none")
    if class_token:
        basis = np.eye(dim)[:4].tolist()
        components = dict(mean=[0.5] * dim, basis=basis, scale=[2.0] * 4)
        statistics = dict(mean=[0.0] * dim, std=[1.0] * dim)
        teacher["class_token"] = dict(dim=dim, dtype="float16", kind="mean", **statistics, components=components)
    moments = dict(scale=0.18215, bias=0.0, shape=[8, size // 2, size // 2], dtype="float16", name="none")
    Manifest(
        num_samples=samples,
        resolution=size,
        class_names=["ant", "bee", "cat"],
        shards=shards,
        teachers={TEACHER: teacher} if features else {},
        latent=moments if latent else None,
    ).save(folder)
    return keys


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def arguments(data, run_dir, **changes):
    """The command line of a tiny run; `changes` by setting with dots written as double underscores."""
    own = {
        "run_dir": run_dir,
        "data.path": data,
        "teacher.names": f"[{TEACHER}]",
        "model.depth": 2,
        "model.width": 16,
        "model.heads": 2,
        "model.patch_size": 4,
        "model.mixer": "token_mlp",
        "model.mixer_hidden": 4,
        "model.projector_dim": 8,
        "method.keep_ratio": 0.5,
        "method.align_depth": 1,
        "optimizer.lr": 0.003,
        "training.max_steps": 6,
        "training.batch_size": 8,
        "training.log_every": 1,
        "training.checkpoint_every": 100,
        "training.sample_every": 0,
        "training.precision": "fp32",
        "training.progress": "false",
        "training.tensorboard": "false",
        "preview.per_class": 2,
        "preview.steps": 2,
    }
    own |= {key.replace("__", "."): value for key, value in changes.items()}
    return [word for key, value in own.items() for word in (f"--{key}", str(value))]


def train_with(words, curves=False):
    """Train in this process as the command line says; returns the result of `train`.

    Without `curves` no curves.png is drawn, which takes longer than the six steps of a tiny run.
    """
    from maskalign.training.preflight import check_data
    from maskalign.training.trainer import train

    config = parse_config(words)
    with nullcontext() if curves else patch("maskalign.training.run_log.draw_curves"):
        return train(config, *check_data(config))


def train_on(data, run_dir, curves=False, **changes):
    """`train_with` the `arguments`."""
    return train_with(arguments(data, run_dir, **changes), curves)


@pytest.fixture
def data_set(tmp_path):
    write_data_set(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def command(data_set, tmp_path):
    """Makes the arguments of a run on the data set."""
    return lambda run="run", **changes: arguments(data_set, tmp_path / run, **changes)


@pytest.fixture
def run(command):
    """Trains in this process; returns the result of `train`."""
    return lambda run="run", curves=False, **changes: train_with(command(run, **changes), curves)


@pytest.fixture
def data_set_of(tmp_path):
    """Writes another data set: (name, settings of write_data_set)."""
    return lambda name, **settings: write_data_set(tmp_path / name, **settings)
