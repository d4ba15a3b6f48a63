"""maskalign evaluate: the same numbers from every kind of source, its report, and one line for every mistake."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from maskalign.evaluation.pictures import PictureDataSet
from tests.on_disk import random_pictures, write_pictures
from tests.tiny_runs import train_on, write_data_set

FEW = ["--allow-singular", "--progress", "false", "--steps", "2", "--precision", "fp32", "--held-out-images", "8"]
LITE = "efficientnet-lite0"


def report_of(folder, name="evaluation.json"):
    return json.loads((folder / name).read_text())


def test_a_run_is_evaluated_into_its_folder(run, data, command):
    words = ["evaluate", run, "--data", data, "--samples", 9, "--bins", 4, *FEW]
    status, out, err = command(*words)
    assert status == 0 and err == []
    report = report_of(run)
    metrics = report["metrics"]
    names = ["frechet", "kernel", "kernel_std", "precision", "recall", "density", "coverage"]
    held_out = ["velocity_loss", "cosine", "align_loss", "stability_gap", "stability_gap_error"]
    held_out += ["stability_gap_matched", "stability_gap_matched_error"]
    assert list(metrics) == [f"{name}[{LITE}]" for name in names] + [f"held_out_{name}" for name in held_out]
    assert report["kind"] == "run" and (report["samples"], report["reference"]) == (9, 48)
    assert report["settings"]["step"] == 2 and report["settings"]["weights"] == "ema"
    bins = ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    for name in ("velocity_loss", "cosine"):
        assert list(report["held_out"][name]) == bins
        assert metrics[f"held_out_{name}"] == pytest.approx(np.mean(list(report["held_out"][name].values())))
    assert f"Frechet distance ({LITE})" in out and "0.00-0.25" in out and "images that the run was trained on" in out
    with open(run / "evaluation-table.csv", newline="") as file:
        rows = {(row["metric"], row["time"]): float(row["value"]) for row in csv.DictReader(file)}
    assert len(rows) == len(metrics) + 8
    assert rows["cosine", bins[1]] == pytest.approx(report["held_out"]["cosine"][bins[1]])
    # Again: nothing in it is left to chance, and the reference comes from the cache.
    status, _, _ = command(*words)
    assert status == 0 and report_of(run) == report


def test_a_checkpoint_has_a_report_of_its_own(run, data, command):
    checkpoint = run / "checkpoints" / "step_00000001"
    before = (run / "evaluation.json").read_bytes() if (run / "evaluation.json").exists() else None
    words = ["--data", data, "--metrics", "none", *FEW]
    status, out, err = command("evaluate", checkpoint, *words)
    assert status == 0 and err == []
    report = report_of(run, "evaluation-step_00000001.json")
    assert report["kind"] == "checkpoint" and report["settings"]["step"] == 1 and report["samples"] == 0
    losses = {"velocity_loss", "cosine", "align_loss", "stability_gap", "stability_gap_error"}
    losses |= {"stability_gap_matched", "stability_gap_matched_error"}
    assert set(report["metrics"]) == {f"held_out_{name}" for name in losses}
    if before is not None:
        assert (run / "evaluation.json").read_bytes() == before
    command("evaluate", checkpoint, *words, "--weights", "model")
    assert report_of(run, "evaluation-step_00000001.json")["metrics"] != report["metrics"]


def test_folder_archive_and_data_set_give_the_same_numbers(data, tmp_path, command):
    arrays = torch.cat(list(PictureDataSet(data, 14).batches(14))).permute(0, 2, 3, 1).numpy()
    arrays = np.concatenate([arrays, random_pictures(4)])
    np.savez(tmp_path / "samples.npz", arrays)
    write_pictures(tmp_path / "samples", arrays)
    found = []
    for source in ("samples.npz", "samples"):
        out = tmp_path / f"of-{source}"
        status, _, err = command("evaluate", tmp_path / source, "--data", data, "--out", out, *FEW)
        assert status == 0, err
        found.append(report_of(out))
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], rel=1e-5)
    assert found[0]["held_out"] is None and [report["kind"] for report in found] == ["npz", "folder"]
    status, out, _ = command("evaluate", data, "--data", data, "--samples", 48, *FEW)
    assert status == 0
    lines = dict(line.rsplit(None, 1) for line in out.splitlines() if LITE in line and "+-" not in line)
    # A set against itself.
    assert float(lines[f"Frechet distance ({LITE})"]) == pytest.approx(0, abs=1e-3)
    assert float(lines[f"Precision (k = 3) ({LITE})"]) == float(lines[f"Coverage (k = 5) ({LITE})"]) == 1


def test_chosen_classes_are_compared_alone(run, data, tmp_path, command):
    words = ["evaluate", run, "--data", data, "--samples", 8, *FEW, "--held-out-images", 0, "--out"]
    cases = (("two", ["0", "2"], [0, 2], 0, 32), ("bee", ["bee"], [1], 0, 16), ("few", ["1"], [1], 9, 9))
    for name, labels, chosen, reference, count in cases:
        status, _, err = command(*words, tmp_path / name, "--classes", *labels, "--reference", reference)
        assert status == 0, err
        report = report_of(tmp_path / name)
        assert (report["reference"], report["settings"]["classes"]) == (count, chosen)


def test_held_out_images_of_another_data_set(run, data, tmp_path, command):
    write_data_set(tmp_path / "other", samples=24, seed=5)
    words = ["evaluate", run, "--data", data, "--metrics", "none", *FEW, "--out"]
    command(*words, tmp_path / "a")
    status, out, err = command(*words, tmp_path / "b", "--held-out", tmp_path / "other")
    assert status == 0, err
    first, second = report_of(tmp_path / "a"), report_of(tmp_path / "b")
    assert first["metrics"] != second["metrics"] and "trained on" not in out
    assert first["settings"]["held_out_was_trained_on"] and not second["settings"]["held_out_was_trained_on"]


def mistakes(run, data, folder):
    """(arguments, exit status, a part of the line) of everything that must end in one line."""
    sized = write_data_set(folder / "sized", samples=12, size=8, grid=(2, 2)) and folder / "sized"
    few = write_pictures(folder / "few", random_pictures(20))
    (folder / "broken.npz").write_bytes(b"PK\x03\x04 and nothing more")
    np.savez(folder / "nan.npz", np.full((3, 16, 16, 3), np.nan, dtype=np.float32))
    (folder / "empty").mkdir()
    broken = write_pictures(folder / "broken", random_pictures(7))
    (broken / "0003.png").write_bytes(b"no picture")
    kernel = ["--metrics", "kernel"]
    return [
        ([few, "--data", data], 2, "20 pictures are too few for a covariance of the 320 features"),
        ([run, "--data", data, "--samples", 320], 2, "320 pictures are too few for a covariance"),
        ([run, "--data", data, "--samples", 400], 2, "48 reference pictures are too few for a covariance"),
        ([few, "--data", data, "--metrics", "neighbors", "--samples", 5], 2, "too few for 5 nearest neighbors"),
        ([run, "--data", data, *kernel, "--samples", 1], 2, "--samples"),
        ([run, "--data", sized, *kernel], 2, "draws pictures of 16x16, but those of"),
        ([few, "--data", sized, *kernel], 2, "holds pictures of 16x16, but those of"),
        ([run, "--data", data, *kernel, "--classes", "3"], 2, "label 3 is outside"),
        ([run, "--data", data, *kernel, "--classes", "-1"], 2, "label"),
        ([few, "--data", data, *kernel, "--classes", "wasp"], 2, "there is no class 'wasp'"),
        ([folder / "broken.npz", "--data", data], 2, "broken.npz: not a readable .npz"),
        ([folder / "nan.npz", "--data", data], 2, "2304 numbers that are NaN or infinite"),
        ([broken, "--data", data, *kernel], 2, "0003.png: not a usable picture"),
        ([folder / "empty", "--data", data], 2, "holds no pictures"),
        ([folder / "nothing", "--data", data], 2, "does not exist"),
        ([run, "--data", folder / "empty"], 2, "has no manifest.json"),
        ([run, "--data", data, "--metrics", "fid"], 2, "'fid' is not one of frechet, kernel, neighbors"),
        ([few, "--data", data, "--metrics", "none"], 2, "nothing to measure"),
        ([run, "--data", data, "--metrics", "none", "--held-out-images", 0], 2, "leaves nothing to measure"),
        ([run, "--data", data, *kernel, "--out", folder / "nan.npz"], 2, "cannot be written to (it is a file)"),
        ([run, "--data", data, "--teacher", "dinov3"], 2, "no teacher is called 'dinov3'"),
        ([run, "--data", data, "--inception", folder / "none.pth"], 2, "no weights file"),
        ([run, "--data", data, "--bins", 0], 2, "--bins"),
        ([run, "--data", data, *kernel, "--cfg-interval", "0.5"], 2, "LO,HI"),
    ]


def test_every_mistake_is_one_line(run, data, tmp_path, command):
    for words, expected, match in mistakes(run, data, tmp_path):
        status, out, err = command("evaluate", *words, "--progress", "false")
        assert (status, len(err), out) == (expected, 1, ""), (words, err, out)
        assert match in err[0] and "Traceback" not in err[0], (words, err)


def test_several_processes_are_refused(run, data, command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, err = command("evaluate", run, "--data", data, *FEW)
    assert status == 2 and len(err) == 1 and "in one process" in err[0]


def test_a_model_that_draws_nan_is_one_line(data, tmp_path, command):
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    train_on(data, run, training__max_steps=1)
    folder = next((run / "checkpoints").glob("step_*"))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in tensors:
            if name.startswith("ema/final_layer.linear.bias"):
                tensors[name] = torch.full_like(tensors[name], torch.nan)
        save_file(tensors, path, metadata=_metadata(path))
    (folder / "COMPLETE").write_text(json.dumps({path.name: path.stat().st_size for path in folder.iterdir()
                                                 if path.name != "COMPLETE"}))  # fmt: skip
    status, out, err = command("evaluate", run, "--data", data, "--samples", 4, "--metrics", "kernel", *FEW)
    assert status == 1 and len(err) == 1 and "non-finite" in err[0], err
    assert not (run / "evaluation.json").exists()


def _metadata(path):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()


def test_a_checkpoint_whose_tensors_have_another_shape(run, data, tmp_path, command):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step_*"):
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace("width: 16", "width: 32"))
        (folder / "COMPLETE").write_text(json.dumps({path.name: path.stat().st_size for path in folder.iterdir()
                                                     if path.name != "COMPLETE"}))  # fmt: skip
    status, _, err = command("evaluate", copy, "--data", data, "--samples", 4, "--metrics", "kernel", *FEW)
    assert status == 2 and len(err) == 1 and "shape" in err[0], err
