"""REG's layout there and back, weights with a class token, mixing layers under old and new names, published sizes."""

import argparse
import json

import pytest
import torch

from maskalign.checkpoints import convert, from_reg, from_repa, load, load_model, to_reg, to_repa
from maskalign.checkpoints.conversion import own_name
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import read_file, reg_checkpoint, repa_checkpoint, write_repa, write_safetensors
from maskalign.errors import UsageError
from maskalign.models import SiT

TINY = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=5, depth=4, width=24, heads=3, teacher_dims=(7, 9),
    class_dim=7, align_depth=2, projector_dim=16, mixer="none", mixer_hidden=6,
)  # fmt: skip


def make(seed, **settings):
    """A model with nothing at zero, so that every tensor matters to the output."""
    model = SiT(**{**TINY, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def run_model(model, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = model.pos_embed.dtype
    x = torch.randn(3, model.in_channels, model.input_size, model.input_size, generator=generator).to(dtype)
    t, labels = torch.rand(3, generator=generator).to(dtype), torch.tensor([0, 5, 2])
    token = torch.randn(3, model.class_dim or 1, generator=generator).to(dtype)
    out = model.eval()(x, t, labels, class_token=token if model.class_dim else None)
    parts = [out.velocity, *out.aligned]
    return parts if out.class_velocity is None else [*parts, out.class_velocity]


def assert_same_model(a, b, seed):
    assert list(a.state_dict()) == list(b.state_dict())
    assert all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())
    for attribute in ("heads", "align_depth", "route", "restore", "teacher_dims", "class_dim", "grid", "num_classes"):
        assert getattr(a, attribute) == getattr(b, attribute)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(run_model(a, seed), run_model(b, seed), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(mixer="attention", mixer_layers=2),
        dict(mixer="attention", mixer_layers=1, qk_norm=True, route=(1, 3), restore="bypass"),
        dict(mixer="attention", mixer_layers=3, restore="fuse", route=(1, 4)),
        dict(mixer="token_mlp", class_dim=5),
        dict(mixer="depthwise_conv", projector="conv", teacher_dims=(4,), class_dim=11),
        dict(teacher_dims=(), class_dim=1, patch_size=8, mlp_ratio=2.7),
        dict(class_dim=64, patch_size=1, route="none"),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "reg",
)
def test_from_reg_of_to_reg_is_the_model(settings, dtype, seed, tmp_path):
    model = make(seed, **settings).to(dtype)
    weights = to_reg(model)
    assert weights["pos_embed"].shape == (1, 1 + model.num_tokens, 24) and not weights["pos_embed"][:, 0].any()
    for read in (from_reg, from_repa):
        assert_same_model(model, read(weights).eval(), seed)
        assert_same_model(model, read(to_repa(model)).eval(), seed)
    torch.save(weights, tmp_path / "w.pt")
    assert_same_model(model, from_reg(torch.load(tmp_path / "w.pt", weights_only=True)).eval(), seed)


def test_names_and_their_order_are_regs(seed):
    """The order is that of REG's own parameters, by which its optimizer's state counts."""
    parts = ["x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"]
    for k in range(4):
        parts += [f"blocks.{k}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
        parts.append(f"blocks.{k}.adaLN_modulation.1")
    parts += [f"projectors.{teacher}.{k}" for teacher in (0, 1) for k in (0, 2, 4)]
    parts += [f"final_layer.{part}" for part in ("linear", "linear_cls", "adaLN_modulation.1")]
    parts += ["cls_projectors2", "wg_norm"]
    expected = ["pos_embed", *(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))]
    expected.remove("y_embedder.embedding_table.bias")
    assert list(to_reg(make(seed), strict=True)) == expected


@pytest.mark.parametrize("size, patch", [("S", 4), ("B", 2), ("L", 8), ("XL", 2)])
def test_presets_are_recognized_by_their_shapes(size, patch):
    with torch.device("meta"):
        model = SiT.from_preset(f"SiT-{size}/{patch}", mixer="attention", mixer_layers=2, class_dim=768)
        again = from_reg(dict(to_reg(model)))
    assert repr(again) == repr(model)
    assert (again.heads, again.align_depth, again.class_dim) == (model.heads, model.align_depth, 768)


def test_whole_checkpoints_and_their_arguments(seed, tmp_path):
    model, ema = make(seed, align_depth=3), make(seed + 1, align_depth=3)
    write_repa(tmp_path / "a.pt", reg_checkpoint(model, ema, steps=77, path="cosine"))
    with torch.serialization.safe_globals([argparse.Namespace]):
        raw = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(raw) == ["model", "ema", "opt", "args", "steps"] and raw["steps"] == 77
    assert raw["args"].encoder_depth == 3 and raw["args"].path_type == "cosine"
    assert_same_model(ema, from_reg(raw, heads=3).eval(), seed)
    assert_same_model(model, from_reg(raw, heads=3, weights="model").eval(), seed)
    loaded = load(tmp_path / "a.pt")
    assert loaded.kind == "file" and (loaded.info.step, loaded.info.path) == (77, "cosine")
    assert_same_model(ema, loaded.model, seed)
    assert_same_model(model, load_model(tmp_path / "a.pt", ema=False), seed)
    # REG's resume loads the optimizer's state into an AdamW over all its parameters, the fixed pos_embed among them.
    parameters = [torch.nn.Parameter(value.clone()) for value in raw["model"].values()]
    torch.optim.AdamW(parameters).load_state_dict(raw["opt"])


@pytest.mark.parametrize("where", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_dropped(where, seed):
    model = make(seed)
    wrapped = {where + name.replace("blocks.1.", "blocks.1._orig_mod."): v for name, v in to_reg(model).items()}
    assert_same_model(model, from_reg(wrapped, heads=3, align_depth=2).eval(), seed)
    plain = make(seed, class_dim=None)
    wrapped = {where + name: value for name, value in to_repa(plain).items()}
    assert_same_model(plain, from_repa(wrapped, heads=3, align_depth=2).eval(), seed)


def test_weights_without_a_class_token(seed):
    plain = make(seed, class_dim=None)
    for weights in (to_repa(plain), {"model": dict(plain.state_dict()), "ema": dict(plain.state_dict())}):
        with pytest.raises(UsageError, match="no class token, so they are REPA's or SiT's: use from_repa"):
            from_reg(weights)
    with pytest.raises(UsageError, match="this one has none; write REPA's"):
        to_reg(plain)
    for read in (from_reg, from_repa):
        more = read(to_repa(plain), class_dim=9)
        assert more.class_dim == 9 and torch.equal(more.blocks[1].attn.qkv.weight, plain.blocks[1].attn.qkv.weight)
        assert not more.final_layer.class_linear.weight.any() and more.class_embedder.proj.weight.any()
        *_, class_velocity = run_model(more, seed)
        assert class_velocity.shape == (3, 9) and not class_velocity.any()
    with pytest.raises(UsageError, match="class token of 7 numbers, which cannot become 9"):
        from_repa(to_reg(make(seed)), class_dim=9)
    assert from_reg(to_reg(make(seed)), class_dim=7).class_dim == 7


def test_a_class_token_with_a_position_is_refused(seed):
    weights = to_reg(make(seed))
    weights["pos_embed"] = weights["pos_embed"] + 1e-3
    for read in (from_reg, from_repa):
        with pytest.raises(UsageError, match="first row that is not zero"):
            read(weights)
    for name in ("cls_projectors2.bias", "wg_norm.weight", "final_layer.linear_cls.weight"):
        less = {key: value for key, value in to_reg(make(seed)).items() if key != name}
        with pytest.raises(UsageError, match=f"lack {own_name(name)}"):
            from_reg(less, heads=3)
    only = {key: value for key, value in to_reg(make(seed)).items() if not key.startswith("cls_projectors2")}
    with pytest.raises(UsageError, match="17 tokens, which is not a square grid"):
        from_repa(only)


@pytest.mark.parametrize(
    "settings, match",
    [
        (dict(mixer="attention"), "REG's layout has no place for a trained mixer"),
        (dict(mixer="token_mlp"), "no place for a trained mixer"),
        (dict(restore="fuse", route=(1, 3)), "no place for the fusion"),
        (dict(projector="conv"), "MLP projectors only"),
        (dict(class_dim=9), r"has 9 numbers and the teachers have \[7, 9\]"),
        (dict(teacher_dims=()), r"has 7 numbers and the teachers have \[\]"),
    ],
    ids=str,
)
def test_what_regs_layout_cannot_hold(settings, match, seed):
    model = make(seed, **settings)
    with pytest.raises(UsageError, match=match) as error:
        to_reg(model, strict=True)
    assert "\n" not in str(error.value)
    with pytest.raises(UsageError, match="place for a class token; write REG's instead"):
        to_repa(model, strict=True)


@pytest.mark.parametrize("layers", [None, 1, 2, 3])
@pytest.mark.parametrize("class_dim", [None, 7])
def test_a_fresh_mixer_continues_any_checkpoint_as_it_is(class_dim, layers, seed):
    model = make(seed, class_dim=class_dim)
    weights = (to_reg if class_dim else to_repa)(model, strict=True)
    more = (from_reg if class_dim else from_repa)(weights, mixer="attention", mixer_layers=layers)
    assert len(more.mixing_layers) == (layers or 2)
    before, after = run_model(model, seed), run_model(more, seed)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # An untrained mixer is no hindrance to REG's layout either.
    assert (to_reg if class_dim else to_repa)(more, strict=True).keys() == weights.keys()


def test_official_sit_weights_take_a_mixer_and_a_class_token(seed):
    plain = make(seed, class_dim=None, teacher_dims=())
    weights = dict(plain.state_dict())
    weights["final_layer.linear.weight"] = torch.cat([weights["final_layer.linear.weight"]] * 2)
    weights["final_layer.linear.bias"] = torch.cat([weights["final_layer.linear.bias"]] * 2)
    model = from_repa(weights, heads=3, mixer="attention", class_dim=7, teacher_dims=(7,), align_depth=2)
    assert model.class_dim == 7 and len(model.mixing_layers) == 2 and len(run_model(model, seed)) == 3


def test_how_many_mixing_layers(seed):
    two = make(seed, mixer="attention", mixer_layers=2)
    more = from_reg(to_reg(two), mixer_layers=4)
    assert len(more.mixing_layers) == 4
    for a, b in zip(run_model(two, seed), run_model(more, seed), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(UsageError, match="have 2 mixing layers, which cannot become 1"):
        from_reg(to_reg(two), mixer_layers=1)
    with pytest.raises(UsageError, match="cannot be replaced by 'token_mlp'"):
        from_reg(to_reg(two), mixer="token_mlp")
    with pytest.raises(UsageError, match="mixer_layers needs the mixer attention"):
        from_reg(to_reg(make(seed)), mixer_layers=2)


def test_the_old_name_of_a_single_mixing_layer(seed, tmp_path):
    model = make(seed, mixer="attention", mixer_layers=1, class_dim=None)
    old = {name.replace("mixer.layers.0.", "mixer.block."): value for name, value in model.state_dict().items()}
    assert "mixer.block.attn.qkv.weight" in old
    assert_same_model(model, from_repa(old, heads=3, align_depth=2).eval(), seed)
    torch.save({"ema": old}, tmp_path / "old.pt")
    assert (
        load_model(tmp_path / "old.pt", heads=3)
        .mixing_layers[0]
        .attn.qkv.weight.equal(old["mixer.block.attn.qkv.weight"])
    )

    from safetensors import safe_open
    from safetensors.torch import save_file

    write_safetensors(tmp_path / "new.safetensors", model, ModelInfo(step=3))
    with safe_open(tmp_path / "new.safetensors", "pt") as file:
        notes = file.metadata()
    save_file({name: value.contiguous() for name, value in old.items()}, tmp_path / "old.safetensors", notes)
    assert_same_model(model, load_model(tmp_path / "old.safetensors"), seed)


# ---- Files -------------------------------------------------------------------------------------------------------


def test_convert_both_ways(seed, tmp_path):
    model, ema = make(seed), make(seed + 1)
    opt = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}
    torch.save(reg_checkpoint(model, ema, 5, opt=opt), tmp_path / "a.pt")
    assert ": safetensors," in convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert ": reg," in convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert ": reg," in convert(tmp_path / "a.pt", tmp_path / "d.pt", to="reg")
    for name in "ab":
        with pytest.raises(UsageError, match="no place for a class token; write REG's instead"):
            convert(next(tmp_path.glob(f"{name}.*")), tmp_path / "e.pt", to="repa")
    for name in ("b.safetensors", "c.pt", "d.pt"):
        assert_same_model(ema, load_model(tmp_path / name), seed)
    whole = read_file(tmp_path / "d.pt")
    assert all(torch.equal(whole["model"][name], value) for name, value in to_reg(model).items())
    # The optimizer's state is of use to the very same weights only.
    assert torch.equal(whole["opt"]["state"][0]["exp_avg"], torch.ones(3))
    assert read_file(tmp_path / "c.pt")["opt"]["state"] == {}

    plain = make(seed, class_dim=None)
    torch.save(repa_checkpoint(plain, plain), tmp_path / "repa.pt")
    assert ": repa," in convert(tmp_path / "repa.pt", tmp_path / "f.pt")
    with pytest.raises(UsageError, match="this one has none; write REPA's"):
        convert(tmp_path / "repa.pt", tmp_path / "e.pt", to="reg")
    assert not (tmp_path / "e.pt").exists()


def test_a_trained_mixer_does_not_fit_regs_layout(seed, tmp_path):
    write_safetensors(tmp_path / "a.safetensors", make(seed, mixer="attention"))
    with pytest.raises(UsageError, match="REG's layout has no place for a trained mixer"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_notes_from_elsewhere_are_not_believed(seed, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = make(seed)
    write_safetensors(tmp_path / "made.safetensors", weights)
    facts = {"class_names": ["a", 3], "latent": None, "vae": 5, "teachers": ["dinov2-b"], "more": 1}
    notes = {"steps": 2, "path": "linear", "model": to_repa(weights)._metadata["maskalign"], "facts": facts}
    tensors = load_file(tmp_path / "made.safetensors")
    save_file(tensors, tmp_path / "a.safetensors", {"maskalign": json.dumps(notes)})
    assert load(tmp_path / "a.safetensors").info == ModelInfo("a", 2, teachers=["dinov2-b"])
    # And none of them is written.
    info = ModelInfo(class_names=["a", 3], latent={"scale": "big"}, vae=5, teachers=["dinov2-b"])
    write_safetensors(tmp_path / "b.safetensors", weights, info)
    assert load(tmp_path / "b.safetensors").info == ModelInfo("b", teachers=["dinov2-b"])


@pytest.mark.parametrize(
    "notes",
    [dict(heads="three"), dict(heads=0), dict(heads=True), dict(heads=3, route=[1]), dict(nonsense=1, heads=3)],
    ids=str,
)
def test_settings_from_elsewhere_end_in_one_line(notes, seed):
    weights = to_reg(make(seed))
    weights._metadata["maskalign"] = notes
    if "nonsense" in notes:
        assert from_reg(weights).heads == 3
        return
    with pytest.raises(UsageError, match="do not make a SiT|heads is") as error:
        from_reg(weights)
    assert "\n" not in str(error.value)


def test_the_command_line_converts(seed, tmp_path, capsys):
    from maskalign.cli import main

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(["convert", *map(str, words)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out + captured.err

    model = make(seed)
    write_safetensors(tmp_path / "a.safetensors", model, ModelInfo(step=9))
    code, text = call(tmp_path / "a.safetensors", tmp_path / "b.bin", "--to", "reg")
    assert code == 0 and "reg, depth 4" in text and "step 9" in text
    assert_same_model(model, load_model(tmp_path / "b.bin"), seed)
    code, text = call(tmp_path / "b.bin", tmp_path / "c.pt", "--to", "repa")
    assert code == 2 and "no place for a class token" in text and text.count("\n") == 1


def test_the_names_in_models_are_the_same_functions():
    from maskalign import models

    assert models.from_repa is from_repa and models.to_repa is to_repa


# ---- Sizes -------------------------------------------------------------------------------------------------------


def counted(preset, **settings):
    """Millions of parameters as the papers count them: with the fixed position embedding, without the projector."""
    with torch.device("meta"):
        model = SiT.from_preset(preset, **{"teacher_dims": (768,), "mixer": "none", **settings})
        weights = to_repa(model) if model.class_dim is None else to_reg(model)
    return sum(value.numel() for name, value in weights.items() if not name.startswith("projectors.")) / 1e6


@pytest.mark.parametrize(
    "preset, settings, published, ours",
    [
        ("SiT-XL/2", dict(), 675, 675.11),  # REPA
        ("SiT-B/2", dict(class_dim=768), 132, 131.68),  # REG
        ("SiT-XL/2", dict(class_dim=768), 677, 676.89),
    ],
    ids=["repa-xl", "reg-b", "reg-xl"],
)
def test_parameter_counts_as_published(preset, settings, published, ours):
    count = counted(preset, **settings)
    assert round(count) == published and count == pytest.approx(ours, abs=0.005)


@pytest.mark.parametrize(
    "preset, settings, published, ours",
    [
        ("SiT-B/2", dict(class_dim=768), 154, 152.94),
        ("SiT-XL/2", dict(class_dim=768), 732, 724.70),
        ("SiT-XL/2", dict(), 728, 722.92),  # REPA + MaskAlign
    ],
    ids=["b", "xl", "xl-repa"],
)
def test_parameter_counts_of_maskalign_beside_the_published_ones(preset, settings, published, ours):
    """The paper does not say what a layer is: two SiT blocks come within 1 % of its counts, one or three do not."""
    count = counted(preset, mixer="attention", mixer_layers=2, **settings)
    assert count == pytest.approx(ours, abs=0.005) and count == pytest.approx(published, rel=0.0101)
    for layers in (1, 3):
        assert counted(preset, mixer="attention", mixer_layers=layers, **settings) != pytest.approx(published, rel=0.02)
