"""Pictures of a real model: the same for any batching, sheets, sets, and the command's errors."""

import numpy as np
import pytest
import torch
from PIL import Image

from maskalign.checkpoints.weight_files import repa_checkpoint, write_repa
from maskalign.cli import main
from maskalign.errors import RunError, UsageError
from maskalign.models import SiT
from maskalign.sampling import Sampling, class_sheet, generate
from maskalign.sampling.command import sample
from maskalign.sampling.network import Network
from maskalign.sampling.noise import image_labels
from maskalign.sampling.settings import parse_classes, parse_interval, spread_classes

NAMES = ["Animals & Nature", "Flags", "Objects", "Symbols"]


@pytest.fixture
def model(random_model):
    return random_model(patch_size=2, depth=2, teacher_dims=(5,), projector_dim=8, mixer="token_mlp", mixer_hidden=6)


@pytest.fixture
def checkpoint(model, tmp_path):
    with torch.no_grad():
        for parameter in model.mixer.adaLN_modulation.parameters():
            parameter.zero_()
    path = tmp_path / "model.pt"
    write_repa(path, repa_checkpoint(model, model, steps=40))
    return path


@pytest.mark.parametrize("sampler", ["ode", "heun", "sde"])
def test_an_image_does_not_depend_on_its_batch(model, sampler):
    model = model.double()
    labels = [0, 1, 2, 3, 4, 0, 1]
    settings = dict(sampler=sampler, steps=3, cfg_scale=1.5, cfg_interval=(0.0, 0.7), seed=5)
    whole = generate(model, labels, Sampling(**settings, batch_size=7))
    pieces = generate(model, labels, Sampling(**settings, batch_size=2))
    # The same noise, bit for bit; matmuls of other sizes may round differently.
    torch.testing.assert_close(whole, pieces, rtol=1e-10, atol=1e-10)
    chosen = generate(model, [4, 1], Sampling(**settings), indices=[4, 6])
    torch.testing.assert_close(chosen, whole[[4, 6]], rtol=1e-10, atol=1e-10)
    other = generate(model, labels, Sampling(**{**settings, "seed": 6}))
    assert (other - whole).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_generate_leaves_the_model_as_it_was(model):
    model.train()
    seen = []
    out = generate(model, [0, 1, 2], Sampling(steps=4, batch_size=2), on_images=seen.append)
    assert model.training and not out.requires_grad and out.dtype == torch.float32
    assert sum(seen) == pytest.approx(3)
    assert generate(model, []).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_projectors_are_left_out(model, precision, monkeypatch):
    """They serve training alone; the pictures must not pay for them."""
    before = generate(model, [0, 1], Sampling(steps=1, precision=precision))
    monkeypatch.setattr(model, "_tap", lambda *tokens: pytest.fail("the projectors ran"))
    assert torch.equal(generate(model, [0, 1], Sampling(steps=1, precision=precision)), before)


def test_weights_are_rounded_once_for_many_calls(model):
    network = Network(model, "bf16")
    assert {p.dtype for p in network.model.parameters()} == {torch.bfloat16} and len(network.model.projectors) == 0
    assert next(model.parameters()).dtype == torch.float32 and len(model.projectors) == 1
    settings = Sampling(steps=3, precision="bf16")
    assert torch.equal(generate(network, [2, 3], settings), generate(model, [2, 3], settings))
    # The original may go on being trained: the network keeps the weights that it was made of.
    with torch.no_grad():
        model.final_layer.linear.bias.add_(1)
    assert not torch.equal(generate(network, [2, 3], settings), generate(model, [2, 3], settings))


def test_a_compiled_model_runs_under_autocast(model):
    """Its forward is bound to the original: a copy would compute with the original's weights."""
    calls = []
    block, forward = model.blocks[0], model.blocks[0].forward
    block.forward = lambda x, c: calls.append(torch.is_autocast_enabled("cpu")) or forward(x, c)
    network = Network(model, "bf16")
    assert network.autocast and network.model is model
    generate(model, [0], Sampling(steps=2, precision="bf16"))
    assert calls == [True, True]


def test_auto_precision_follows_the_processor(model, monkeypatch):
    for native, name in [(True, "bf16"), (False, "fp32")]:
        monkeypatch.setattr("maskalign.runtime.device.cpu_has_bf16", lambda native=native: native)
        assert Network(model, "auto").precision == name


def test_bf16_is_close_to_fp32(model):
    with torch.no_grad():  # calm weights: a random model of gain above one multiplies any rounding
        for parameter in model.parameters():
            parameter.mul_(0.3)
    settings = dict(steps=4, cfg_scale=2.0)
    full, half = (generate(model, [0, 1], Sampling(**settings, precision=p)) for p in ("fp32", "bf16"))
    assert not torch.equal(full, half)
    assert (full - half).norm() / full.norm() < 0.05


def test_bad_labels_and_bad_weights(model):
    with pytest.raises(UsageError, match="label 5 is outside"):
        generate(model, [0, 5])
    with pytest.raises(UsageError, match="label -1 is outside"):
        generate(model, [-1])
    with pytest.raises(ValueError, match="indices"):
        generate(model, [0, 1], indices=[0])
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(float("nan"))
    with pytest.raises(RunError, match="non-finite"):
        generate(model, [0], Sampling(steps=1))


def test_a_class_row_is_the_same_on_every_sheet(model):
    settings = Sampling(steps=2)
    sheet, pictures = class_sheet(model, [3, 0], NAMES, settings, per_class=3, title="step 1")
    assert pictures.shape == (2, 3, 8, 8, 3) and pictures.dtype == torch.uint8
    assert isinstance(sheet, Image.Image)
    _, alone = class_sheet(model, [0], NAMES, settings, per_class=2)
    # Sums in another batch are rounded another way, so a pixel may fall into the next of 256 levels.
    assert (alone[0].int() - pictures[1, :2].int()).abs().max() <= 1


def test_sample_writes_a_sheet_and_its_pictures(checkpoint, tmp_path):
    (path,) = sample(checkpoint, tmp_path / "out", settings=Sampling(steps=2), per_class=3, progress=False)
    assert path == tmp_path / "out" / "grid.png"
    sheet = Image.open(path)
    assert sheet.height > 4 * 64 and sheet.width > 3 * 64
    files = sorted(file.name for file in (tmp_path / "out" / "images").iterdir())
    assert files == [f"{label:04d}_{k:03d}.png" for label in range(4) for k in range(3)]
    before = np.asarray(Image.open(tmp_path / "out" / "images" / "0002_001.png"))
    sample(checkpoint, tmp_path / "two", settings=Sampling(steps=2), classes="2", per_class=2, progress=False)
    assert np.array_equal(before, np.asarray(Image.open(tmp_path / "two" / "images" / "0002_001.png")))


def test_sample_writes_a_set(checkpoint, tmp_path):
    settings = Sampling("sde", steps=2, batch_size=4)
    (path,) = sample(checkpoint, tmp_path / "out", settings=settings, npz=10, progress=False)
    images = np.load(path)["arr_0"]
    assert images.shape == (10, 8, 8, 3) and images.dtype == np.uint8
    from maskalign.checkpoints.weight_files import load_file

    model = load_file(checkpoint)[0]
    labels = image_labels(0, range(10), 4)
    truth = generate(model, labels, settings)
    expected = ((truth.clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - expected).max() <= 0.51
    (only,) = sample(checkpoint, tmp_path / "b", settings=settings, npz=10, classes="3,1", progress=False)
    assert not np.array_equal(np.load(only)["arr_0"], images)
    with pytest.raises(UsageError, match="steps 2, now 3"):
        sample(checkpoint, tmp_path / "out", settings=Sampling("sde", steps=3), npz=10, progress=False)


def test_latents_need_a_decoder(tmp_path, seed):
    model = SiT(input_size=8, in_channels=4, num_classes=2, depth=1, width=16, heads=2, align_depth=1, mixer="none")
    write_repa(tmp_path / "a.pt", repa_checkpoint(model, model))
    with pytest.raises(UsageError, match="--vae"):
        sample(tmp_path / "a.pt", tmp_path / "out", progress=False)


def run_command(capfd, *words):
    """(exit status, standard output, lines of standard error) of a command, in this process."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    out, err = capfd.readouterr()
    return end.value.code, out.strip(), err.strip().splitlines()


def test_the_command(checkpoint, tmp_path, capfd):
    words = ["sample", checkpoint, "--out", tmp_path / "o", "--steps", 2, "--cfg-scale", 2, "--classes"]
    status, out, err = run_command(capfd, *words, "0", "2")
    assert status == 0, err
    assert out == str(tmp_path / "o" / "grid.png")
    assert "images" in err[-1]  # the progress bar
    assert len(list((tmp_path / "o" / "images").iterdir())) == 16
    status, _, err = run_command(capfd, *words, "4")
    assert status == 2
    assert err[-1] == "maskalign: error: --classes: label 4 is outside the model's classes 0 to 3"
    status, out, err = run_command(capfd, "convert", checkpoint, tmp_path / "m.safetensors")
    assert status == 0 and "safetensors" in out and "step 40" in out, err
    for wrong, match in [
        (["sample", tmp_path / "nothing", "--out", "o"], "does not exist"),
        ([*words[:4], "--cfg-interval", "0.7"], "LO,HI"),
        ([*words[:4], "--npz", "0"], "--npz"),
        ([*words[:4], "--npz", "4", "--strip"], "a second call"),
        ([*words[:4], "--frames", "1"], "--frames"),
        ([*words[:4], "--interpolate", "class", "--classes", "1"], "needs two classes"),
        ([*words[:4], "--interpolate", "labels"], "interpolate"),
        ([*words[:4], "--animate", "mp4"], "animate"),
        (["sample", checkpoint, "--out", checkpoint], "it is a file"),
        (["convert", checkpoint, checkpoint], "the file to read"),
        (["convert", checkpoint, tmp_path / "a", "--to", "onnx"], "onnx"),
    ]:
        status, _, err = run_command(capfd, *wrong)
        assert status == 2 and len(err) == 1 and match in err[0], err


def test_parse_classes():
    assert parse_classes("0,3", NAMES) == [0, 3]
    assert parse_classes("[1, 2]", NAMES) == [1, 2]
    assert parse_classes("1-3", NAMES) == [1, 2, 3]
    assert parse_classes("3 0", NAMES) == [3, 0]
    assert parse_classes("animals & nature, Flags", NAMES) == [0, 1]
    assert parse_classes("animals & nature", NAMES) == [0]
    for text, match in [
        ("4", "label 4"), ("-1", "label -1"), ("2-9", "label 9"), ("Falgs", "did you mean 'flags'"),
        ("qqq", "no class"), ("", "none given"), (",", "no class"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=match) as error:
            parse_classes(text, NAMES)
        assert "\n" not in str(error.value)


def test_parse_interval_and_spread():
    assert parse_interval("0,0.7") == (0.0, 0.7) and parse_interval("(0.1, 1)") == (0.1, 1.0)
    for text in ("1", "a,b", "0,1,2", ""):
        with pytest.raises(UsageError, match="LO,HI"):
            parse_interval(text)
    assert spread_classes(4) == [0, 1, 2, 3]
    assert spread_classes(1000) == list(range(0, 1000, 100))


@pytest.mark.parametrize(
    "wrong",
    [
        dict(sampler="dpm"), dict(steps=0), dict(cfg_scale=-1.0), dict(cfg_scale=float("nan")),
        dict(cfg_interval=(0.5, 0.2)), dict(cfg_interval=(0.0, 2.0)), dict(batch_size=0), dict(precision="fp8"),
        dict(path="edm"),
    ],
)  # fmt: skip
def test_bad_settings(wrong):
    with pytest.raises(UsageError) as error:
        Sampling(**wrong)
    assert "\n" not in str(error.value)
