# ruff: noqa: F811 (fixtures are imported)
"""ImageNet at 512 px: recipes at a small width, and weights of 256 px that continue there."""

import math

import pytest
import torch
from timm.layers import resample_abs_pos_embed

from maskalign.checkpoints import convert, from_repa, load, load_model, to_repa
from maskalign.checkpoints.command import resize
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import write_safetensors
from maskalign.config import dump_config, load_config, model_sizes
from maskalign.errors import UsageError
from maskalign.models import SiT
from maskalign.models.layers import sincos_position_embedding
from maskalign.planning.devices import load_device
from maskalign.planning.estimate import plan_run
from maskalign.planning.options import Options
from tests import tiny_runs
from tests.tiny_runs import command, data_set, data_set_of, run, write_data_set  # noqa: F401

TINY = dict(
    input_size=32, patch_size=2, in_channels=4, num_classes=3, depth=2, width=24, heads=3, teacher_dims=(6,),
    align_depth=1, projector_dim=8, mixer="none",
)  # fmt: skip


def test_positions_keep_their_place_in_the_image():
    width, small, large = 48, 16, 32
    resampled = sincos_position_embedding(width, (large, large), small).double()
    for row, column in ((0, 0), (3, 30), (31, 17)):
        y, x = ((i + 0.5) * small / large - 0.5 for i in (row, column))
        found = resampled[0, row * large + column]
        for channel in range(width // 4):
            frequency = 10000 ** (-channel / (width / 4))
            four = [f(p * frequency) for p in (x, y) for f in (math.sin, math.cos)]
            assert found[channel :: width // 4].tolist() == pytest.approx(four, abs=1e-6)
    # The interpolation that others use agrees where the waves are long.
    other = resample_abs_pos_embed(
        sincos_position_embedding(width, (small, small)), [large, large], num_prefix_tokens=0
    ).double()
    slow = [c for c in range(width) if c % (width // 4) >= 4]
    inner = [r * large + c for r in range(4, 28) for c in range(4, 28)]
    assert (resampled - other)[0][inner][:, slow].abs().max() < 5e-3
    assert torch.equal(sincos_position_embedding(width, (4, 4), 4), sincos_position_embedding(width, (4, 4)))


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
@pytest.mark.parametrize("class_dim", [None, 6])
def test_a_file_of_256_px_becomes_one_of_512_px(ending, class_dim, tmp_path, seed):
    torch.manual_seed(seed)
    model = SiT(**TINY, class_dim=class_dim)
    latent = {"scale": 0.18215, "bias": 0.0, "shape": [8, 32, 32], "dtype": "float16", "name": "vae"}
    write_safetensors(tmp_path / "small.safetensors", model, ModelInfo(step=3, latent=latent))
    line = convert(tmp_path / "small.safetensors", tmp_path / f"large{ending}", input_size=64)
    assert "position embedding resampled from 16x16 to 32x32 tokens" in line
    loaded = load(tmp_path / f"large{ending}", heads=3)
    large = loaded.model
    assert large.grid == (32, 32) and large.heads == 3 and large.class_dim == class_dim
    if ending == ".safetensors":
        assert loaded.info.latent["shape"] == [8, 64, 64]
    assert torch.equal(large.pos_embed, sincos_position_embedding(24, (32, 32), 16))
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in large.named_parameters())
    # There and back, and one step further, which counts by the first grid.
    assert torch.equal(resize(large, 32).pos_embed, model.pos_embed)
    assert torch.equal(resize(large, 128).pos_embed, sincos_position_embedding(24, (64, 64), 16))
    x = torch.randn(1, 4, 64, 64)
    token = None if class_dim is None else torch.randn(1, class_dim)
    assert large(x, torch.rand(1), torch.tensor([1]), class_token=token).velocity.shape == x.shape


def test_what_cannot_be_resized(tmp_path, seed):
    torch.manual_seed(seed)
    write_safetensors(tmp_path / "mixer.safetensors", SiT(**{**TINY, "mixer": "token_mlp"}))
    learned = SiT(**TINY)
    learned.pos_embed += torch.randn_like(learned.pos_embed)
    write_safetensors(tmp_path / "learned.safetensors", learned)
    write_safetensors(tmp_path / "plain.safetensors", SiT(**TINY))
    for name, size, message in (
        ("mixer", 64, "token_mlp has weights for 256 tokens"),
        ("learned", 64, "not the fixed sine-cosine"),
        ("plain", 63, "not a multiple of the patch size 2"),
        ("plain", 0, "not a multiple of the patch size 2"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(tmp_path / f"{name}.safetensors", tmp_path / "out.safetensors", input_size=size)
        assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(UsageError, match="not the fixed sine-cosine"):
        from_repa(to_repa(learned), input_size=64)


def test_a_learned_position_embedding_starts_no_run(run, data_set, tmp_path, seed):
    run("first", training__max_steps=1)
    torch.manual_seed(seed)
    model = load_model(tmp_path / "first")
    model.pos_embed += torch.randn_like(model.pos_embed)
    write_safetensors(tmp_path / "learned.safetensors", model)
    with pytest.raises(UsageError, match="position embedding of its own"):
        run("second", training__init_from=tmp_path / "learned.safetensors", training__max_steps=1)


@pytest.mark.parametrize("name", ["reg", "maskalign", "repa"])
def test_a_recipe_at_a_small_width(name, tmp_path, monkeypatch, seed):
    """64x64 latents and 1,024 tokens through data, training, a checkpoint and sampling."""
    from maskalign.sampling import Sampling, generate
    from maskalign.training.preflight import check_data
    from maskalign.training.trainer import train

    recipe = load_config(f"imagenet512/xl2/{name}")
    small = load_config(f"imagenet256/xl2/{name}")
    places = ("runs/imagenet512", "runs/imagenet256"), ("datasets/imagenet512", "datasets/imagenet256")
    text = dump_config(recipe)
    for there, here in places:
        text = text.replace(there, here)
    assert text == dump_config(small)  # the same training; the data make it 512 px
    assert model_sizes(recipe)["patch_size"] == 2

    monkeypatch.setattr(tiny_runs, "TEACHER", "dinov2-b")
    write_data_set(
        tmp_path / "data",
        samples=4,
        shard_size=4,
        size=128,
        grid=(32, 32),
        latent=True,
        class_token=recipe.model.class_token,
    )
    recipe.run_dir, recipe.data.path, recipe.data.num_workers = str(tmp_path / "run"), str(tmp_path / "data"), 0
    model = recipe.model
    model.preset, model.depth, model.width, model.heads, model.patch_size = None, 2, 24, 3, 2
    model.projector_dim, recipe.method.align_depth = 8, 1
    training = recipe.training
    training.compile, training.max_steps, training.batch_size, training.device = False, 1, 2, "cpu"
    training.precision, training.progress = "fp32", False
    training.sample_every, training.tensorboard = 0, False
    recipe.preview.classes = recipe.preview.per_class = recipe.preview.steps = 1
    train(recipe, *check_data(recipe))
    trained = load_model(tmp_path / "run")
    assert trained.num_tokens == 1024 and trained.grid == (32, 32) and trained.pos_embed.shape == (1, 1024, 24)
    drawn = generate(trained, [0], Sampling(steps=1))
    assert drawn.shape == (1, 4, 64, 64) and drawn.isfinite().all()


@pytest.mark.slow
def test_the_plan_of_512_px():
    """Tokens, the teacher's grid at 448 px, and every weight, token_mlp's among them."""
    recipe = load_config("imagenet512/xl2/maskalign")
    recipe.data.path = "nowhere"
    recipe.model.preset, recipe.model.depth, recipe.model.width, recipe.model.heads = None, 2, 24, 3
    recipe.model.patch_size, recipe.method.align_depth, recipe.training.compile = 2, 1, False
    recipe.model.mixer, recipe.training.batch_size, recipe.training.device = "token_mlp", 8, "cpu"
    device = load_device("h100")
    plan = plan_run(recipe, Options(world_size=1, device=device, image_size=512))
    assert plan.tokens == 1024 and plan.teachers["dinov2-b"].grid == (32, 32)
    own = dict(input_size=64, width=24, heads=3, depth=2, align_depth=1, teacher_dims=(768,), class_dim=768)
    built = SiT(**own, mixer="token_mlp", mixer_hidden=recipe.model.mixer_hidden)
    assert sum(plan.parameters.values()) == sum(p.numel() for p in built.parameters())
    assert built.mixer.fc1.weight.shape[1] == 1024 and plan.asked["memory_gib"] > 0
