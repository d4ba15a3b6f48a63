"""REPA's layout, SiT's layout, safetensors: there and back, and files that must be refused."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch

from maskalign.checkpoints import convert, from_repa, load, load_weights, to_repa
from maskalign.checkpoints.conversion import HeadsUnknown
from maskalign.checkpoints.spec import ModelInfo, ModelSpec
from maskalign.checkpoints.weight_files import load_file, read_file, repa_checkpoint, write_repa, write_safetensors
from maskalign.config.presets import SIZES
from maskalign.errors import UsageError
from maskalign.models import SiT

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=5, depth=4, width=24, heads=3, teacher_dims=(7, 9),
    align_depth=2, projector_dim=16, mixer_hidden=6,
)  # fmt: skip


def randomize(model, seed, skip=()):
    """Weights with nothing at zero, so that every tensor matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(tuple(skip)):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def inputs(model, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size, generator=generator)
    labels = torch.randint(0, model.num_classes + 1, (3,), generator=generator)
    return x.to(dtype), torch.rand(3, generator=generator).to(dtype), labels


def assert_same_model(a, b):
    assert list(a.state_dict()) == list(b.state_dict())
    for name, value in a.state_dict().items():
        assert value.dtype == b.state_dict()[name].dtype
        assert torch.equal(value, b.state_dict()[name]), name
    for attribute in ("heads", "align_depth", "route", "restore", "teacher_dims", "grid", "num_classes", "in_channels"):
        assert getattr(a, attribute) == getattr(b, attribute)
    assert repr(a) == repr(b)


@pytest.mark.parametrize(
    "settings",
    [
        dict(mixer="none"),
        dict(mixer="token_mlp"),
        dict(mixer="depthwise_conv", qk_norm=True),
        dict(mixer="attention", mlp_ratio=2.7),
        dict(mixer="none", teacher_dims=(), route="none"),
        dict(mixer="token_mlp", restore="fuse", route=(1, 3)),
        dict(mixer="none", restore="bypass", route=(1, 3), attention="sdpa"),
        dict(mixer="none", projector="conv", patch_size=4, in_channels=1, teacher_dims=(4,)),
        dict(mixer="token_mlp", patch_size=1),
        dict(mixer="none", width=64, heads=2, align_depth=4),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_repa_of_to_repa_is_the_model(settings, dtype, seed, tmp_path):
    model = randomize(SiT(**{**TINY, **settings}), seed).to(dtype)
    assert_same_model(model, from_repa(to_repa(model)).eval())
    # What to_repa notes beside the tensors also survives a file.
    torch.save(to_repa(model), tmp_path / "w.pt")
    assert_same_model(model, from_repa(torch.load(tmp_path / "w.pt", weights_only=True)).eval())
    x, t, labels = inputs(model, seed, dtype)
    ours, again = model(x, t, labels), from_repa(to_repa(model)).eval()(x, t, labels)
    assert torch.equal(ours.velocity, again.velocity)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize("patch", [2, 8])
def test_presets_are_recognized_by_their_shapes(size, patch):
    with torch.device("meta"):
        model = SiT.from_preset(f"SiT-{size}/{patch}", mixer="none")
    plain = {name: torch.empty(value.shape, device="meta") for name, value in model.state_dict().items()}
    with torch.device("meta"):
        again = from_repa(plain)
    assert repr(again) == repr(model)
    assert again.heads == SIZES[size]["heads"] and again.align_depth == SIZES[size]["align_depth"]
    assert again.input_size == 32 and again.num_classes == 1000 and again.teacher_dims == (768,)


def test_names_are_repas():
    names = set(to_repa(SiT(**{**TINY, "mixer": "none"})))
    expected = {
        "pos_embed", "x_embedder.proj.weight", "x_embedder.proj.bias", "y_embedder.embedding_table.weight",
        "final_layer.linear.weight", "final_layer.linear.bias",
        "final_layer.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.bias",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        expected |= {f"t_embedder.mlp.{k}.{kind}" for k in (0, 2)}
        expected |= {f"projectors.{teacher}.{k}.{kind}" for teacher in (0, 1) for k in (0, 2, 4)}
        for depth in range(4):
            parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
            expected |= {f"blocks.{depth}.{part}.{kind}" for part in parts}
    assert names == expected


def test_whole_checkpoints_and_arguments(seed):
    model, ema = (randomize(SiT(**{**TINY, "mixer": "none"}), seed + k) for k in (0, 1))
    checkpoint = {
        "model": dict(model.state_dict()),
        "ema": dict(ema.state_dict()),
        "args": argparse.Namespace(encoder_depth=3),
        "steps": 12,
    }
    averaged = from_repa(checkpoint, heads=3)
    assert averaged.align_depth == 3 and averaged.heads == 3
    assert torch.equal(averaged.x_embedder.proj.weight, ema.x_embedder.proj.weight)
    raw = from_repa(checkpoint, heads=3, align_depth=1, weights="model")
    assert raw.align_depth == 1
    assert torch.equal(raw.x_embedder.proj.weight, model.x_embedder.proj.weight)
    wrapped = {f"module.{name}": value for name, value in model.state_dict().items()}
    assert torch.equal(from_repa(wrapped, heads=3).pos_embed, model.pos_embed)


def test_repas_early_names(seed):
    """The first checkpoints call the blocks after the tap decoder_blocks."""
    model = randomize(SiT(**{**TINY, "mixer": "none", "align_depth": 3}), seed)
    early = {name.replace("blocks.3.", "decoder_blocks.0."): value for name, value in model.state_dict().items()}
    again = from_repa(early, heads=3)
    assert again.align_depth == 3
    x, t, labels = inputs(model, seed)
    assert torch.equal(model(x, t, labels).velocity, again.eval()(x, t, labels).velocity)


@pytest.mark.parametrize("mixer", ["token_mlp", "depthwise_conv", "attention"])
def test_a_fresh_mixer_continues_a_checkpoint_as_it_is(mixer, seed):
    model = randomize(SiT(**{**TINY, "mixer": "none"}), seed)
    more = from_repa(to_repa(model), mixer=mixer).eval()
    x, t, labels = inputs(model, seed)
    assert torch.equal(model(x, t, labels).velocity, more(x, t, labels).velocity)
    # A fresh mixer is no hindrance to REPA's layout, a trained one is.
    assert set(to_repa(more, strict=True)) == set(to_repa(model))
    randomize(more, seed)
    with pytest.raises(UsageError, match="no place for a trained mixer"):
        to_repa(more, strict=True)
    with pytest.raises(UsageError, match="cannot be replaced"):
        from_repa(to_repa(more), mixer="none")


@pytest.mark.parametrize(
    "settings, match", [(dict(restore="fuse", route=(1, 3)), "fusion"), (dict(projector="conv"), "MLP projectors")]
)
def test_what_repas_layout_cannot_hold(settings, match):
    with pytest.raises(UsageError, match=match):
        to_repa(SiT(**{**TINY, "mixer": "none", **settings}), strict=True)


class OfficialSiT(torch.nn.Module):
    """Official SiT around our blocks: its own time, embedding and final layer, as its code runs them."""

    def __init__(self, core, final):
        super().__init__()
        self.core, self.final = core, final

    def forward(self, x, t, labels):
        core = self.core
        half = torch.arange(128, dtype=t.dtype) / 128
        angle = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0, dtype=t.dtype)) * half)
        features = torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)
        c = core.t_embedder.mlp(features) + core.y_embedder(labels)
        tokens = core.x_embedder(x) + core.pos_embed
        for block in core.blocks:
            tokens = block(tokens, c)
        final = core.final_layer
        shift, scale = final.adaLN_modulation(c)
        tokens = final.norm_final(tokens) * (1 + scale[:, None]) + shift[:, None]
        tokens = tokens @ self.final[0].T + self.final[1]
        p, grid = core.patch_size, core.grid
        image = tokens.reshape(len(x), *grid, p, p, -1).permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, *x.shape[2:])
        return image.chunk(2, dim=1)[0] if image.shape[1] == 2 * x.shape[1] else image


@pytest.mark.parametrize("learn_sigma", [True, False])
def test_official_sit_with_time_turned_round(learn_sigma, seed):
    core = randomize(SiT(**{**TINY, "mixer": "none", "teacher_dims": ()}), seed).double()
    channels = core.in_channels * (2 if learn_sigma else 1)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(4 * channels, core.width, generator=generator, dtype=torch.float64)
    bias = torch.randn(4 * channels, generator=generator, dtype=torch.float64)
    official = OfficialSiT(core, (weight, bias))
    state_dict = {**core.state_dict(), "final_layer.linear.weight": weight, "final_layer.linear.bias": bias}
    ours = from_repa(state_dict, heads=3, layout="auto" if learn_sigma else "sit").eval()
    x, t, labels = inputs(core, seed, torch.float64)
    for time in (t, torch.zeros_like(t), torch.ones_like(t)):
        expected = -official(x, 1 - time, labels)
        out = ours(x, time, labels).velocity
        assert (out - expected).norm() / expected.norm() < 1e-12


# ---- Files -------------------------------------------------------------------------------------------------------


def save_repa(path, seed, **settings):
    model, ema = (randomize(SiT(**{**TINY, "mixer": "none", **settings}), seed + k) for k in (0, 1))
    write_repa(path, repa_checkpoint(model, ema, steps=1234, path="cosine"))
    return model, ema


def test_repa_file_there_and_back(tmp_path, seed):
    model, ema = save_repa(tmp_path / "a.pt", seed)
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(raw) == ["model", "ema", "opt", "args", "steps"]
    assert isinstance(raw["args"], argparse.Namespace) and raw["args"].encoder_depth == 2
    loaded, info = load_file(tmp_path / "a.pt")
    assert info == ModelInfo("a", 1234, True, "cosine")
    assert_same_model(ema, loaded)
    assert_same_model(model, load_file(tmp_path / "a.pt", ema=False)[0])
    # REPA's resume loads the optimizer's state into an AdamW over all its parameters, the fixed pos_embed among them.
    parameters = [torch.nn.Parameter(value.clone()) for value in raw["model"].values()]
    torch.optim.AdamW(parameters).load_state_dict(raw["opt"])


def test_convert_round_trip_through_every_layout(tmp_path, seed):
    _, ema = save_repa(tmp_path / "a.pt", seed)
    line = convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert "safetensors" in line and "step 1234" in line
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    convert(tmp_path / "c.pt", tmp_path / "d.bin", to="safetensors")
    os.rename(tmp_path / "d.bin", tmp_path / "d.safetensors")
    for name in ("b.safetensors", "c.pt", "d.safetensors"):
        loaded = load(tmp_path / name)
        assert_same_model(ema, loaded.model)
        assert loaded.info.step == 1234 and loaded.info.path == "cosine"
    weights = load_weights(tmp_path / "b.safetensors")
    assert torch.equal(weights["pos_embed"], ema.pos_embed)


def test_safetensors_keeps_mixer_and_settings(tmp_path, seed):
    model = randomize(SiT(**{**TINY, "restore": "fuse", "route": (1, 3)}), seed)
    write_safetensors(tmp_path / "a.safetensors", model, ModelInfo(step=7))
    assert_same_model(model, load_file(tmp_path / "a.safetensors")[0])
    with pytest.raises(UsageError, match="no place for"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert not (tmp_path / "b.pt").exists()


def test_converting_repas_own_file_keeps_its_optimizer(tmp_path, seed):
    model, ema = (randomize(SiT(**{**TINY, "mixer": "none"}), seed + k) for k in (0, 1))
    opt = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    torch.save(repa_checkpoint(model, ema, 5, opt=opt), tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.pt")
    assert torch.equal(read_file(tmp_path / "b.pt")["opt"]["state"][0]["exp_avg"], torch.ones(3))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_with_code_is_refused_and_not_run(legacy, tmp_path):
    bait, file = tmp_path / "ran", tmp_path / "bad.pt"
    torch.save({"ema": Bomb(bait)}, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UsageError, match="refused.*system") as error:
        load_file(file)
    assert not bait.exists() and "\n" not in str(error.value)


def test_a_bare_pickle_with_code_is_refused(tmp_path):
    bait, file = tmp_path / "ran", tmp_path / "bad.pt"
    file.write_bytes(pickle.dumps({"ema": Bomb(bait)}))
    with pytest.raises(UsageError) as error:
        load_file(file)
    assert not bait.exists() and "\n" not in str(error.value)


class OtherSettings(argparse.Namespace):
    """Not the one class that is allowed."""


def test_only_namespace_itself_is_allowed(tmp_path, seed):
    model, ema = (SiT(**{**TINY, "mixer": "none"}) for _ in range(2))
    checkpoint = repa_checkpoint(model, ema)
    torch.save({**checkpoint, "args": OtherSettings(encoder_depth=2)}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="refused"):
        read_file(tmp_path / "a.pt")
    torch.save({**checkpoint, "args": argparse.Namespace(bad=Bomb(tmp_path / "ran"))}, tmp_path / "a.pt")
    with pytest.raises(UsageError, match="refused"):
        read_file(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()
    # The allowance ends with the call.
    torch.save(argparse.Namespace(a=1), tmp_path / "b.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "b.pt", weights_only=True)


@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_damaged_files_are_one_clear_line(ending, tmp_path, seed):
    _, ema = save_repa(tmp_path / "a.pt", seed)
    if ending == ".safetensors":
        write_safetensors(tmp_path / "a.safetensors", ema)
    whole = (tmp_path / f"a{ending}").read_bytes()
    damaged = {
        "empty": b"",
        "text": b"hello\n" * 10,
        "short": whole[: len(whole) // 2],
        "head": whole[:40],
        "flipped": bytes([whole[0] ^ 255]) + whole[1:],
        "zeros": bytes(5000),
    }
    for what, content in damaged.items():
        file = tmp_path / f"{what}{ending}"
        file.write_bytes(content)
        with pytest.raises(UsageError) as error:
            load_file(file)
        message = str(error.value)
        assert "\n" not in message and file.name in message and "not a readable" in message, message


def test_an_archive_without_weights(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "nothing")
    torch.save([1, 2], tmp_path / "b.pt")
    torch.save({"ema": {}}, tmp_path / "c.pt")
    torch.save({"ema": {"x": torch.ones(2)}}, tmp_path / "d.pt")
    for name in "abcd":
        with pytest.raises(UsageError, match=f"{name}.pt") as error:
            load_file(tmp_path / f"{name}.pt")
        assert "\n" not in str(error.value)


def test_wrong_weights_are_named(seed):
    state_dict = dict(SiT(**{**TINY, "mixer": "none"}).state_dict())
    changed = dict(state_dict)
    with pytest.raises(HeadsUnknown, match="4 blocks of width 24.*--heads N"):
        from_repa(state_dict)
    del changed["blocks.2.attn.proj.bias"]
    with pytest.raises(UsageError, match="lack blocks.2.attn.proj.bias"):
        from_repa(changed, heads=3)
    with pytest.raises(UsageError, match="have blocks.1.extra"):
        from_repa({**state_dict, "blocks.1.extra": torch.ones(1)}, heads=3)
    with pytest.raises(UsageError, match=r"mlp.fc2.weight is \(3, 3\)"):
        from_repa({**state_dict, "blocks.1.mlp.fc2.weight": torch.ones(3, 3)}, heads=3)
    with pytest.raises(UsageError, match="square grid"):
        from_repa({**state_dict, "pos_embed": torch.ones(1, 15, 24)})
    with pytest.raises(UsageError, match="do not make a SiT"):
        from_repa(state_dict, heads=5)
    with pytest.raises(UsageError, match="no weights"):
        from_repa({})
    with pytest.raises(ValueError, match="layout"):
        from_repa(state_dict, layout="dit")


def test_convert_says_what_it_cannot_do(tmp_path, seed):
    save_repa(tmp_path / "a.pt", seed)
    cases = [
        (tmp_path / "none.pt", tmp_path / "b.pt", "no such file|does not exist"),
        (tmp_path / "a.pt", tmp_path / "b.xyz", "cannot tell the layout"),
        (tmp_path / "a.pt", tmp_path / "a.pt", "the file to read"),
        (tmp_path, tmp_path / "b.pt", "no complete checkpoint"),
    ]
    for src, dst, match in cases:
        with pytest.raises(UsageError, match=match):
            convert(src, dst)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match="cannot tell what this is"):
        convert(tmp_path / "notes.txt", tmp_path / "b.pt")


def test_a_model_is_never_built_without_the_class_token_that_is_asked_for():
    from maskalign.checkpoints.build import build_model
    from maskalign.config import parse_config

    config = parse_config(["--model.preset", "SiT-S/2", "--model.class_token", "true", "--model.depth", "1"])
    sizes = dict(input_size=8, in_channels=3, num_classes=2, teacher_dims=[4])
    with torch.device("meta"):
        with pytest.raises(ValueError, match="class_dim"):
            build_model(config, ModelSpec(**sizes))
        assert build_model(config, ModelSpec(**sizes, class_dim=5)).class_dim == 5
