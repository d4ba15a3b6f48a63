"""Weights out of a run's checkpoint: to a model, to REPA's layout, to safetensors, and onto a sheet of pictures."""

from dataclasses import replace

import pytest
import torch

from maskalign.checkpoints import ModelInfo, convert, load, load_model, load_weights
from maskalign.checkpoints.weight_files import load_file, read_file
from maskalign.errors import UsageError
from maskalign.sampling import Sampling
from maskalign.sampling.command import sample
from tests.made_runs import SPEC, make_run


@pytest.fixture
def run(tmp_path, seed):
    return make_run(tmp_path / "run", seed)


def test_a_run_gives_its_model_and_what_is_known_of_it(run):
    path, model, averaged = run
    checkpoint = path / "checkpoints" / "step_00000002"
    for where in (path, checkpoint):
        loaded = load(where)
        assert loaded.info == ModelInfo(
            name="run", class_names=["cats", "dogs", "flags"], latent=None, vae=None, ema=True, step=2, path="cosine",
            teachers=["efficientnet-lite0"],
        )  # fmt: skip
        assert loaded.spec == SPEC
        assert loaded.kind == ("run" if where == path else "checkpoint") and loaded.info.label == "run, step 2"
        assert (loaded.source, loaded.folder) == (checkpoint, path) and loaded.config.objective.path == "cosine"
        assert not loaded.model.training
        for name, parameter in loaded.model.named_parameters():
            assert torch.equal(parameter, averaged[name]) and not parameter.requires_grad
    raw = load_model(path, ema=False)
    assert all(torch.equal(a, b) for a, b in zip(raw.parameters(), model.parameters(), strict=True))
    weights = load_weights(path)
    assert all(torch.equal(weights[name], value) for name, value in averaged.items())


def test_a_run_as_safetensors_is_the_same_model(run, tmp_path, seed):
    path, model, _ = run
    assert "step 2" in convert(path, tmp_path / "a.safetensors")
    ours, (again, info) = load_model(path), load_file(tmp_path / "a.safetensors")
    assert info == replace(load(path).info, name="a") == load(tmp_path / "a.safetensors").info
    assert repr(ours) == repr(again) and again.heads == 3 and again.align_depth == 3
    x, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 3])
    assert torch.equal(ours(x, t, labels).velocity, again(x, t, labels).velocity)
    convert(path, tmp_path / "raw.safetensors", weights="model")
    assert torch.equal(load_file(tmp_path / "raw.safetensors")[0].pos_embed, model.pos_embed)
    assert torch.equal(
        load_weights(tmp_path / "raw.safetensors")["blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight
    )


def test_a_run_without_a_mixer_as_repas_checkpoint(tmp_path, seed):
    path, model, averaged = make_run(tmp_path / "run", seed, **{"model.mixer": "none"})
    convert(path, tmp_path / "a.pt")
    raw = read_file(tmp_path / "a.pt")
    assert raw["steps"] == 2 and raw["args"].encoder_depth == 3 and raw["args"].path_type == "cosine"
    for name, parameter in model.named_parameters():
        assert torch.equal(raw["model"][name], parameter)
        assert torch.equal(raw["ema"][name], averaged[name])


def test_a_trained_mixer_does_not_fit_repas_layout(run, tmp_path):
    with pytest.raises(UsageError, match="no place for a trained mixer"):
        convert(run[0], tmp_path / "a.pt")
    assert not list(tmp_path.glob("*.pt"))


def test_a_sheet_knows_the_runs_classes_and_path(run, tmp_path):
    written = sample(
        run[0], tmp_path / "out", settings=Sampling("sde", steps=2), classes="dogs,flags", per_class=2, progress=False
    )
    assert written and all(path.exists() for path in written)
    assert sorted(file.name for file in (tmp_path / "out" / "images").iterdir()) == [
        "0001_000.png", "0001_001.png", "0002_000.png", "0002_001.png",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="did you mean 'dogs'"):
        sample(run[0], tmp_path / "out", classes="dogz", progress=False)
