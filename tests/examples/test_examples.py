"""Every file of examples/ does what it says, with fewer steps and pictures."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def example(monkeypatch, one_thread):
    """Imports an example by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("minimal", "custom_mixer", "sample_in_python")
    yield import_module
    for name in names:
        sys.modules.pop(name, None)


def test_minimal_learns_and_draws(example, monkeypatch, tmp_path, capsys):
    minimal = example("minimal")
    monkeypatch.setattr(minimal, "PER_CLASS", 4)
    minimal.main(steps=12, out=str(tmp_path / "out.png"))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    first, last = (float(line.split("velocity loss")[1].split()[0]) for line in (lines[0], lines[-1]))
    assert last < 0.8 * first
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.width > 4 * 64 and sheet.height >= 4 * 64


def test_minimal_is_the_loss_of_the_package(example, seed):
    """The formula written out in the example, and `training_loss` given the same draws."""
    from maskalign.objective import Draws, training_loss

    minimal = example("minimal")
    torch.manual_seed(seed)
    model = minimal.make_model(24).double()
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    x, labels, z = torch.rand(5, 3, 32, 32).double() * 2 - 1, torch.arange(5) % 4, torch.randn(5, 64, 24).double()
    torch.manual_seed(seed)
    total, velocity, cosine = minimal.loss_of(model, x, labels, z)
    torch.manual_seed(seed)
    time, noise, drop = torch.rand(5), torch.randn_like(x), torch.rand(5) < minimal.LABEL_DROPOUT
    subset = minimal.draw_subset(5, model.grid, minimal.KEEP)
    theirs = training_loss(model, x, labels, [z], Draws(time, noise, drop, subset, None, None))
    torch.testing.assert_close(velocity, theirs.velocity, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(-cosine, theirs.alignment, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(total, theirs.total, rtol=1e-6, atol=1e-9)


def test_custom_mixer_starts_as_the_identity_and_drops_what_it_mixed(example, monkeypatch, seed):
    custom = example("custom_mixer")
    torch.manual_seed(seed)
    mixer = custom.AverageMixer(12)
    x, c = torch.randn(3, 10, 12), torch.randn(3, 12)
    assert torch.equal(mixer(x, c), x)
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    mixed = mixer(x, c)
    assert not torch.allclose(mixed, x, atol=0.01)
    subset = torch.stack([torch.randperm(10)[:4].sort().values for _ in range(3)])
    rows = mixed.gather(1, subset.unsqueeze(-1).expand(-1, -1, 12))
    torch.testing.assert_close(mixer(x, c, subset), rows)
    other = x.clone()
    other[:, 9] = torch.randn(3, 12)  # every token sees every other one
    assert ((mixer(other, c)[:, :9] - mixed[:, :9]).abs().amax(-1) > 0).all()

    monkeypatch.setattr(custom.minimal, "PER_CLASS", 4)
    losses = custom.main(steps=8)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("class_dim", [None, 12])
def test_sample_in_python_draws_from_a_file_of_weights(example, class_dim, tmp_path, capsys):
    from maskalign.checkpoints.weight_files import write_safetensors
    from maskalign.models import SiT

    model = SiT(
        input_size=8, patch_size=2, in_channels=3, num_classes=3, depth=2, width=32, heads=2, align_depth=1,
        teacher_dims=[12], class_dim=class_dim,
    )  # fmt: skip
    write_safetensors(tmp_path / "model.safetensors", model)
    example("sample_in_python").main(str(tmp_path / "model.safetensors"), str(tmp_path / "out.png"))
    assert ("(2, 3, 8, 8)" in capsys.readouterr().out) == (class_dim is None)
    with Image.open(tmp_path / "out.png") as sheet:
        assert sheet.height >= 3 * 64


@pytest.mark.slow
def test_own_pictures(tmp_path):
    for number in range(12):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (20 * number, 100, 255 - 20 * number)).save(path)
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = "--model.width 32 --model.heads 2 --model.depth 2 --method.align_depth 1 --training.max_steps 3"
    settings += " --training.batch_size 4 --preview.classes 2 --preview.steps 2"
    done = subprocess.run(
        ["bash", str(EXAMPLES / "own_pictures.sh"), "pictures", "out", *settings.split()],
        cwd=tmp_path, env=os.environ | {"PATH": programs, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "contact_sheet.png").is_file()
    assert list((tmp_path / "out" / "samples").rglob("*.png"))
