"""Run folders as training, evaluation and analysis leave them, written by hand."""

import csv
import json

import numpy as np
import pytest
import yaml
from PIL import Image

COLUMNS = ["step", "time", "loss", "velocity_loss", "align_loss", "grad_norm", "lr", "keep_ratio", "images_per_second",
           "peak_memory_mib"]  # fmt: skip


def write_png(path, level, size=(120, 90)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), level, np.uint8)).save(path)


def write_run(path, keep=0.5, loss=1.0, steps=(100, 200, 300), rows=60, evaluation=True, analysis=True, notes=""):
    """A run folder; `notes` goes wherever a file may hold free text."""
    path.mkdir(parents=True)
    settings = {
        "seed": 0, "run_dir": str(path), "data": {"path": f"datasets/{notes or 'cifar10'}"},
        "model": {"depth": 2, "width": 16, "patch_size": 4, "mixer": "token_mlp"},
        "method": {"keep_ratio": {"kind": "step", "start": keep, "end": 1.0, "begin": 0.9}, "align_weight": 0.5},
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    with open(path / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for k in range(rows):
            writer.writerow([
                5 * (k + 1), 2.0 * (k + 1), loss, loss / (k + 1) ** 0.5, -0.01 * k, 1 + 1 / (k + 1), 1e-4, keep, 50 + k,
                900,
            ])  # fmt: skip
    for step in steps:
        write_png(path / "samples" / f"step_{step:08d}.png", min(255, step // 2))
    if evaluation:
        bins = [f"{k / 5:.1f}-{(k + 1) / 5:.1f}" for k in range(5)]
        record = {
            "source": f"{path.name}, step 300 {notes}", "data": f"datasets/cifar10 {notes}", "samples": 2000,
            "metrics": {f"FDD {notes}": 40 * loss, "precision": 0.6 / loss},
            "held_out": {"velocity_loss": {name: loss * (k + 1) for k, name in enumerate(bins)}},
            "settings": {"steps": 50},
        }  # fmt: skip
        (path / "evaluation.json").write_text(json.dumps(record))
    if analysis:
        write_png(path / "analysis" / "maps-run.png", 77)
        text = f"# Outcome\n\nThe set is **stable**. {notes}\n\n| a | b |\n|-|-|\n| 1 | 2 |\n"
        (path / "analysis" / "outcome.md").write_text(text)
    return path


@pytest.fixture(scope="session", name="write_run")
def write_run_fixture():
    """The function that writes a run folder."""
    return write_run


@pytest.fixture(scope="session", name="write_png")
def write_png_fixture():
    """The function that writes a PNG of one gray level."""
    return write_png


@pytest.fixture
def two_runs(tmp_path):
    """MaskAlign and REPA, the one a little better."""
    return [
        write_run(tmp_path / "maskalign", keep=0.5, loss=0.9),
        write_run(tmp_path / "repa", keep=1.0, loss=1.1, steps=(100, 300), analysis=False),
    ]
