"""What a step is given of the teachers: rows with the class token in front, and the class token to be denoised."""

import numpy as np
import pytest
import torch

from maskalign.config import parse_config, validate_with_data
from maskalign.data import ShardStream
from maskalign.data.build import encode
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.teachers import load_teacher_like, quantize_rows, resample_tokens
from maskalign.teachers.features import Features
from tests.random_shards import RESNET, VIT, make_data_set

CPU = torch.device("cpu")
GRID = (10, 10)  # that of VIT


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Data sets with both teachers' rows and class tokens, int8 and float16."""
    found = {}
    for dtype in ("int8", "float16"):
        found[dtype] = tmp_path_factory.mktemp(dtype)
        make_data_set(found[dtype], counts=(9,))
        own = dict(teacher=f"{VIT},{RESNET}", weights="random,random", device="cpu", quiet=True)
        encode(found[dtype], dtype=dtype, class_components=5, **own)
    return found


def build(folder, names=VIT, grid=GRID, **settings):
    """(Features, what they give of one batch, the batch with everything)."""
    own = {"model.preset": "SiT-S/2", "model.class_token": "true", "training.batch_size": 4, "data.path": folder}
    own |= {"teacher.names": f"[{names}]", "teacher.weights": "random"} | settings
    config = parse_config([word for key, value in own.items() for word in (f"--{key}", str(value))])
    manifest = Manifest.load(folder)
    facts = validate_with_data(config, manifest)
    features = Features(config, manifest, facts.teachers, grid, CPU, class_token=facts.class_token)
    fields = [*features.fields, *(["image"] if features.needs_images else [])]
    read = next(iter(ShardStream(str(folder), 4, streams=1, fields=fields)))
    everything = ["image", VIT, RESNET, f"{VIT}.class", f"{RESNET}.class"]
    batch = next(iter(ShardStream(str(folder), 4, streams=1, fields=everything)))
    assert read["key"] == batch["key"]
    return features, *features(read), batch


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_cached_rows_get_the_class_token_in_front(folders, dtype):
    features, (z,), r, batch = build(folders[dtype])
    assert features.fields == [VIT, f"{VIT}.class"] and not features.needs_images
    assert (features.dims, features.class_dim) == ([64], 64)
    assert z.shape == (4, 101, 64) and z.dtype == getattr(torch, dtype)
    assert torch.equal(z[:, 1:], batch[VIT])
    token = batch[f"{VIT}.class"]
    assert r.dtype == torch.float32 and torch.equal(r, token.float())
    assert torch.equal(z[:, 0], quantize_rows(token.float()) if dtype == "int8" else token)
    assert torch.nn.functional.cosine_similarity(z[:, 0].float(), r).min() > 0.9995


def test_rows_on_another_grid_are_resampled_and_the_class_token_is_not(folders):
    _, (z,), r, batch = build(folders["int8"], grid=(4, 4))
    assert z.shape == (4, 17, 64) and z.dtype == torch.float32
    assert torch.equal(z[:, 1:], resample_tokens(batch[VIT], GRID, (4, 4))) and torch.equal(z[:, 0], r)


@pytest.mark.parametrize("name", [VIT, RESNET])
def test_computed_ones_are_the_teachers(folders, name):
    features, (z,), r, batch = build(folders["int8"], name, grid=(5, 5), **{"teacher.mode": "online"})
    assert features.fields == [] and features.needs_images
    entry = Manifest.load(folders["int8"]).teachers[name]
    rows, token = load_teacher_like(name, entry, weights="random", image_size=16).tokens_and_class(batch["image"])
    torch.testing.assert_close(r, token)
    torch.testing.assert_close(z[:, 0], token)
    torch.testing.assert_close(z[:, 1:], resample_tokens(rows, entry["grid"], (5, 5)))
    np.testing.assert_allclose(r.numpy(), batch[f"{name}.class"].numpy(), rtol=3e-3, atol=3e-3)


def test_a_teacher_without_statistics_says_so_before_training(tmp_path):
    make_data_set(tmp_path, counts=(6,))
    with pytest.raises(UsageError, match=f"{RESNET}: .*maskalign data encode"):
        build(tmp_path, RESNET)
    features = Features(
        parse_config(["--model.preset", "SiT-S/2", "--model.class_token", "true", "--teacher.weights", "random"]),
        Manifest.load(tmp_path), [(VIT, False)], GRID, CPU, class_token=(VIT, False),
    )  # fmt: skip
    (z,), r = features(next(iter(ShardStream(str(tmp_path), 4, fields=["image"]))))
    assert z.shape == (4, 101, 64) and torch.equal(z[:, 0], r)


def test_each_of_several_teachers_has_its_own(folders):
    features, (first, second), r, batch = build(folders["float16"], f"{RESNET},{VIT}")
    dim = batch[RESNET].shape[-1]
    assert (features.dims, features.class_dim) == ([dim, 64], dim)
    assert torch.equal(second[:, 0], batch[f"{VIT}.class"]) and torch.equal(second[:, 1:], batch[VIT])
    torch.testing.assert_close(r, batch[f"{RESNET}.class"].float())
    assert first.shape == (4, 101, dim)  # on the student's grid


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_without_alignment_the_class_token_alone_is_read(folders, mode):
    own = {"method.align_weight": 0, "teacher.mode": mode}
    features, teachers, r, batch = build(folders["int8"], f"{VIT},{RESNET}", **own)
    assert teachers == [] and features.dims == [] and features.class_dim == 64
    assert features.fields == ([f"{VIT}.class"] if mode == "cached" else [])
    np.testing.assert_allclose(r.numpy(), batch[f"{VIT}.class"].numpy(), rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_principal_components_of_the_class_token(folders, mode):
    own = {"model.class_token_dim": 3, "teacher.mode": mode}
    features, (z,), r, batch = build(folders["int8"], **own)
    assert features.class_dim == 3 and z.shape == (4, 101, 64)  # the alignment sees all of it
    token = batch[f"{VIT}.class"].numpy().astype(np.float64)
    stored = Manifest.load(folders["int8"]).teachers[VIT]["class_token"]["components"]
    mean, basis, scale = (np.array(stored[key]) for key in ("mean", "basis", "scale"))
    want = ((token - mean) @ basis[:3].T) / scale[:3]
    assert r.dtype == torch.float32
    np.testing.assert_allclose(r.numpy(), want, rtol=0, atol=1e-4 if mode == "cached" else 0.05)


def test_without_a_class_token_nothing_of_it_is_read(folders):
    features, (z,), r, batch = build(folders["int8"], **{"model.class_token": "false"})
    assert features.fields == [VIT] and features.class_dim is None and r is None
    assert torch.equal(z, batch[VIT])
