"""The sampling benchmark: fair rounds, honest differences, and no speed for pictures that are not equal."""

import csv

import pytest
import torch

from benchmarks import sampling
from maskalign.checkpoints.weight_files import repa_checkpoint, write_repa
from maskalign.models import SiT


@pytest.fixture
def run(tmp_path):
    torch.manual_seed(0)
    model = SiT(
        input_size=8, patch_size=4, in_channels=3, num_classes=3, depth=1, width=16, heads=2, align_depth=1,
        teacher_dims=(5,), mixer="none",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    write_repa(tmp_path / "toy.pt", repa_checkpoint(model, model))
    return tmp_path / "toy.pt"


def bench(run, out):
    words = ["--presets", "", "--images", "2", "--steps", "1", "--picture-steps", "2", "--rounds", "3"]
    return sampling.main(["--runs", str(run), *words, "--out", str(out)])


def test_rows_of_a_trained_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, "matmul_peak", lambda *peak: 1e9)
    assert bench(run, tmp_path / "s.csv") == 0
    rows = list(csv.DictReader(open(tmp_path / "s.csv")))
    assert [row["way"] for row in rows] == list(sampling.WAYS)
    assert float(rows[0]["x_fp32"]) == 1 and rows[0]["psnr_db"] == ""
    assert all(float(row["psnr_db"]) > 30 and float(row["images_per_second"]) > 0 for row in rows[1:])
    assert "| toy.pt | bf16 |" in capsys.readouterr().out
    monkeypatch.setattr(sampling, "TOLERANCE", {**sampling.TOLERANCE, "psnr_db": 1e9})
    assert bench(run, tmp_path / "s.csv") == 1
    assert "ignore its speed" in capsys.readouterr().out


def test_differences_are_what_they_say():
    truth = torch.full((2, 4, 4, 3), 100, dtype=torch.uint8)
    images = truth.clone()
    assert sampling.differences(images, truth)["psnr_db"] == float("inf")
    images[1] = 110
    found = sampling.differences(images, truth)
    assert found["mean_levels"] == 5 and found["max_levels"] == 10 and found["within_4_levels"] == 0.5
    assert found["worst_psnr_db"] == pytest.approx(28.13, abs=0.01) and found["psnr_db"] == pytest.approx(
        31.14, abs=0.01
    )


def test_a_preset_does_something():
    """A fresh model predicts zero: in any precision it would draw the same pictures."""
    model = sampling.preset_model("SiT-S/8")
    x = torch.randn(1, 4, 32, 32)
    assert model(x, torch.tensor([0.5]), torch.tensor([1])).velocity.abs().mean() > 1e-3
