"""A tiny model, a small data set written with the standard library alone, and runs trained on it in seconds."""

import hashlib
import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.config import parse_config
from maskalign.data.format.manifest import Manifest, Shard
from maskalign.models import SiT

TEACHER = "efficientnet-lite0"


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


def write_data_set(folder, samples=24, size=16, grid=(4, 4), dim=6, features=True, latent=False, class_token=False):
    """Random images of three classes, with int8 features, class tokens and latents where asked for."""
    rng, class_rng = np.random.default_rng(0), np.random.default_rng(1)
    folder.mkdir(parents=True)
    shards = []
    for first in range(0, samples, 8):
        path = folder / f"shard-{first // 8:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + 8, samples)):
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
                    info = tarfile.TarInfo(f"{number:08d}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        data = path.read_bytes()
        count = min(8, samples - first)
        shards.append(Shard(path.name, count, len(data), hashlib.sha256(data).hexdigest()))
    teacher = dict(tokens=grid[0] * grid[1], dim=dim, grid=list(grid), dtype="int8", normalize="none")
    if class_token:
        components = dict(mean=[0.5] * dim, basis=np.eye(dim)[:4].tolist(), scale=[2.0] * 4)
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
    return folder


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def train_run(data, run_dir, **changes):
    """Train a tiny model; `changes` by setting with dots written as double underscores. Returns run_dir."""
    from maskalign.training.preflight import check_data
    from maskalign.training.trainer import train

    own = {
        "run_dir": run_dir,
        "data.path": data,
        "teacher.names": f"[{TEACHER}]",
        "model.depth": 3,
        "model.width": 16,
        "model.heads": 2,
        "model.patch_size": 4,
        "model.mixer": "token_mlp",
        "model.mixer_hidden": 4,
        "model.projector_dim": 8,
        "method.align_depth": 2,
        "method.keep_ratio": 0.5,
        "optimizer.lr": 0.01,
        "training.max_steps": 4,
        "training.batch_size": 8,
        "training.checkpoint_every": 2,
        "training.sample_every": 0,
        "training.precision": "fp32",
        "training.progress": "false",
        "training.tensorboard": "false",
        "preview.per_class": 1,
        "preview.steps": 1,
    }
    own |= {key.replace("__", "."): value for key, value in changes.items()}
    config = parse_config([word for key, value in own.items() for word in (f"--{key}", str(value))])
    train(config, *check_data(config))
    return run_dir


@pytest.fixture(scope="session")
def make_data():
    """Writes a data set: (folder, settings of `write_data_set`)."""
    return write_data_set


@pytest.fixture(scope="session")
def make_run():
    """Trains a run: (data set, folder, settings)."""
    return train_run


@pytest.fixture(scope="session")
def data_set(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("analysis") / "data")


@pytest.fixture(scope="session")
def masked_run(data_set, tmp_path_factory):
    """Two checkpoints of a run on subsets of 8 of 16 tokens."""
    return train_run(data_set, tmp_path_factory.mktemp("analysis") / "masked")


@pytest.fixture(scope="session")
def full_run(data_set, tmp_path_factory):
    """Two checkpoints of REPA: all tokens, no mixer."""
    folder = tmp_path_factory.mktemp("analysis") / "full"
    return train_run(data_set, folder, method__keep_ratio=1, model__mixer="none")
