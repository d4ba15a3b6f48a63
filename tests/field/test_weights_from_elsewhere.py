"""Checkpoints that people bring: DiT's, SiT's of every objective, bare state dicts, sizes that no preset has."""

import argparse
import logging
import math
import os
import stat

import pytest
import torch

from maskalign.checkpoints import convert, from_repa, load, load_model, to_repa
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import read_file, write_safetensors
from maskalign.cli import main
from maskalign.errors import RunError, UsageError
from maskalign.models import SiT

SIZES = dict(
    input_size=8, patch_size=2, in_channels=4, num_classes=3, depth=2, width=24, heads=3, teacher_dims=(),
    align_depth=1, mixer="none",
)  # fmt: skip
# What train.py of SiT, DiT and REPA put into `args`, as far as it matters.
SIT = dict(model="SiT-Tiny/2", num_classes=3, image_size=64, path_type="Linear", prediction="velocity")
DIT = dict(model="DiT-XL/2", num_classes=3, image_size=64, global_batch_size=256)
REPA = dict(model="SiT-Tiny/2", num_classes=3, resolution=64, path_type="linear", prediction="v", encoder_depth=2)


def weights_of(seed, channels=8, **changes):
    """(a SiT, its weights as official SiT and DiT have them: `channels` predicted)."""
    model = SiT(**{**SIZES, **changes})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    weights = dict(model.state_dict())
    for name in ("weight", "bias"):
        own = weights[f"final_layer.linear.{name}"]
        weights[f"final_layer.linear.{name}"] = torch.randn(
            4 * channels, *own.shape[1:], generator=generator, dtype=own.dtype
        )
    return model.eval(), weights


def save(path, weights, as_dict=False, **args):
    checkpoint = {"model": weights, "ema": weights, "opt": {}, "args": args if as_dict else argparse.Namespace(**args)}
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    "args, message",
    [
        (DIT, "DiT-XL/2.*not of a SiT"),
        ({**SIT, "prediction": "noise"}, "trained to predict 'noise', and not the velocity"),
        ({**SIT, "prediction": "score"}, "trained to predict 'score'"),
        ({**SIT, "path_type": "VP"}, "on the path 'VP'"),
        ({**SIT, "path_type": "GVP", "prediction": "v"}, "contradict each other"),
        ({**SIT, "path_type": 3}, "args.path_type is 3"),
        ({**SIT, "num_classes": 1000}, "1000 classes, but the label table has 4 rows"),
        ({**SIT, "model": "SiT-XL/2"}, "preset with depth 28, width 1152"),
        ({**REPA, "encoder_depth": 0}, "args.encoder_depth is 0"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("as_dict", [False, True])
def test_another_objective_is_refused(args, message, as_dict, tmp_path, seed):
    path = save(tmp_path / "a.pt", weights_of(seed, 4 if args.get("prediction") == "v" else 8)[1], as_dict, **args)
    heads = None if "XL/2" in args["model"] else 3
    for read in (
        lambda: convert(path, tmp_path / "b.safetensors", heads=heads),
        lambda: load(path, heads=heads),
        lambda: from_repa(read_file(path), heads=heads),
    ):
        with pytest.raises(UsageError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "b.safetensors").exists()


def velocity_of_sit(core, weights, x, t, labels):
    """What official SiT's code computes, at its own time: t = 1 is the data."""
    half = torch.arange(128, dtype=t.dtype) / 128
    angle = t[:, None] * torch.exp(-math.log(10000.0) * half)
    c = core.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=1)) + core.y_embedder(labels)
    tokens = core.x_embedder(x) + core.pos_embed
    for block in core.blocks:
        tokens = block(tokens, c)
    shift, scale = core.final_layer.adaLN_modulation(c)
    tokens = core.final_layer.norm_final(tokens) * (1 + scale[:, None]) + shift[:, None]
    tokens = tokens @ weights["final_layer.linear.weight"].T + weights["final_layer.linear.bias"]
    image = tokens.reshape(len(x), 4, 4, 2, 2, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, 8, 8)
    return image[:, : x.shape[1]]


@pytest.mark.parametrize("path_type, path", [("Linear", "linear"), ("GVP", "cosine")])
@pytest.mark.parametrize("channels", [8, 4], ids=["learn_sigma", "velocity_alone"])
def test_sit_is_mapped_with_its_path(path_type, path, channels, tmp_path, seed):
    core, weights = weights_of(seed, channels)
    file = save(tmp_path / "a.pt", weights, **{**SIT, "path_type": path_type})
    line = convert(file, tmp_path / "b.safetensors", heads=3)
    assert f"{path} path" in line
    for where in (tmp_path / "b.safetensors",):
        loaded = load(where)
        assert loaded.info.path == path and loaded.model.heads == 3
        generator = torch.Generator().manual_seed(seed)
        x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.rand(2, generator=generator)
        labels = torch.tensor([0, 3])
        expected = -velocity_of_sit(core, weights, x, 1 - t, labels)
        found = loaded.model(x, t, labels).velocity
        assert (found - expected).norm() / expected.norm() < 1e-4


def test_a_bare_state_dict_is_taken_with_a_warning(tmp_path, seed, caplog):
    _, weights = weights_of(seed)
    torch.save(weights, tmp_path / "bare.pt")
    with caplog.at_level(logging.WARNING):
        load(tmp_path / "bare.pt", heads=3)
    assert len(caplog.records) == 1 and "bare.pt" in caplog.text
    assert "does not say how they were trained" in caplog.text and "an official SiT's" in caplog.text
    for write in (
        lambda path: save(path, weights, **SIT),
        lambda path: write_safetensors(path, weights_of(seed)[0]),
    ):
        caplog.clear()
        path = tmp_path / ("a.pt" if not (tmp_path / "a.pt").exists() else "a.safetensors")
        write(path)
        load(path, heads=3)
        assert not caplog.records
    from_repa(to_repa(weights_of(seed)[0]))
    assert not caplog.records


def test_heads_are_asked_for_where_nothing_tells_them(tmp_path, seed, capsys):
    """They are 64 wide in no preset of these sizes, and a guess would give another function without a word."""
    _, weights = weights_of(seed, 4)
    path = save(tmp_path / "a.pt", weights, **REPA)
    for heads, message in ((None, "2 blocks of width 24.*--heads N"), (5, "do not make a SiT"), (0, "heads is 0")):
        with pytest.raises(UsageError, match=message):
            convert(path, tmp_path / "b.safetensors", heads=heads)
        assert not (tmp_path / "b.safetensors").exists()
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(path), str(tmp_path / "b.safetensors"), "--heads", "3"])
    assert ended.value.code == 0
    assert "3 heads" in capsys.readouterr().out
    again = load_model(tmp_path / "b.safetensors")
    assert again.heads == 3 and again.align_depth == 2  # from args.encoder_depth
    x, t, labels = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 3])
    own = from_repa(weights, heads=3).eval()
    assert torch.equal(own(x, t, labels).velocity, again(x, t, labels).velocity)
    # The width of a head is in the shapes where queries and keys are normalized.
    _, normed = weights_of(seed, 4, qk_norm=True)
    assert from_repa(normed).heads == 3


def test_exports_carry_what_sampling_needs(tmp_path, seed):
    latent = {"scale": 0.5, "bias": -0.1}
    info = ModelInfo("a", 7, True, "cosine", ["a", "b", "c"], latent, "folder/vae", ["dinov2-b"])
    model = weights_of(seed)[0]
    write_safetensors(tmp_path / "a.safetensors", model, info)
    assert load(tmp_path / "a.safetensors").info == info
    again = load_model(tmp_path / "a.safetensors")
    assert (again.heads, again.align_depth, again.training) == (3, 1, False)
    write_safetensors(tmp_path / "b.safetensors", model, ModelInfo(class_names=["a", "b"]))
    with pytest.raises(UsageError, match="name 2 classes, but its weights are for 3"):
        load(tmp_path / "b.safetensors")


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_exports_have_the_permissions_of_new_files(umask, mode, ending, tmp_path, seed):
    write_safetensors(tmp_path / "a.safetensors", weights_of(seed)[0])
    before = os.umask(umask)
    try:
        convert(tmp_path / "a.safetensors", tmp_path / f"b{ending}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"b{ending}").stat().st_mode) == mode


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_a_place_that_cannot_be_written_is_one_line(ending, tmp_path, seed, monkeypatch):
    write_safetensors(tmp_path / "a.safetensors", weights_of(seed)[0])
    (tmp_path / "file").write_text("x")
    for target in ("/proc/none", "/dev/null/none", str(tmp_path / "file")):
        with pytest.raises((RunError, UsageError), match="cannot be written|cannot be made") as error:
            convert(tmp_path / "a.safetensors", f"{target}/b{ending}")
        assert "\n" not in str(error.value) and ".tmp" not in str(error.value)
    (tmp_path / "closed").mkdir()
    (tmp_path / "closed").chmod(0o555)
    if os.geteuid() == 0:  # permissions do not bind root: refuse as the system would

        def refuse(self, *args, **kwargs):
            raise PermissionError(13, "Permission denied", str(self))

        monkeypatch.setattr("pathlib.Path.touch", refuse)
    with pytest.raises((RunError, UsageError), match="Permission denied") as error:
        convert(tmp_path / "a.safetensors", tmp_path / "closed" / f"b{ending}")
    assert "\n" not in str(error.value) and not list((tmp_path / "closed").iterdir())


def test_a_hub_that_does_not_answer_names_the_settings_and_the_installed_teacher(monkeypatch):
    from maskalign.teachers.hub import check_weights

    monkeypatch.setattr("maskalign.runtime.hub.in_cache", lambda repository: False)
    monkeypatch.setattr("maskalign.runtime.hub.hub_answers", lambda url: False)
    with pytest.raises(UsageError) as error:
        check_weights("dinov2-b", None)
    said = str(error.value)
    assert all(word in said for word in ("dinov2-b", "does not answer", "teacher.weights", "--weights of data encode"))
    assert "efficientnet-lite0, which is installed" in said and "\n" not in said
