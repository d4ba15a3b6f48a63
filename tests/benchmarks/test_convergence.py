"""The convergence benchmark: what it counts and measures, against arithmetic; and small runs of the whole."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.convergence.clock import Calibration, Phase, key_of, phase_at, phases
from benchmarks.convergence.command import main
from benchmarks.convergence.data import prepare
from benchmarks.convergence.flops import step_tflop
from benchmarks.convergence.quality import heldout_losses
from benchmarks.convergence.recipes import RECIPES, SUITES, own_recipe, recipe_config
from benchmarks.convergence.report import draw_curves, draw_ends, ratios_to_repa, read_rows, table, time_to
from benchmarks.convergence.run import read_job, write_job
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.models import SiT

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--set", "model.width=16", "--set", "model.heads=2", "--set", "model.projector_dim=8",
    "--set", "training.batch_size=8", "--set", "training.log_every=1",
    "--steps", "6", "--points", "3", "--sample-points", "1", "--samples", "6", "--sampler-steps", "2",
    "--heldout", "8", "--reference", "8", "--suite", "screening", "--recipes", "repa,maskalign-fast",
]  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of small images: train and test, two classes."""
    root, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 8)):
        for number in range(count):
            folder = root / part / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """The images as the benchmark prepares them: (work folder, training part, held-out part)."""
    work = tmp_path_factory.mktemp("work")
    return work, *prepare(str(images), work / "data" / "tiny", "efficientnet-lite0", quiet=True)


def words(images, work, out, *more):
    return ["--data", str(images), "--name", "tiny", "--work", str(work), "--out", str(out), "--seeds", "0",
            *SMALL, *more]  # fmt: skip


def test_every_recipe_is_a_valid_config_and_every_suite_has_repa():
    for name, settings in RECIPES.items():
        assert phases(recipe_config(settings), 64), name
    for name, suite in SUITES.items():
        # The base of the paper's ablations is REG.
        assert ("reg" if name == "ablations" else "repa") in suite.recipes and set(suite.shares) <= set(suite.recipes)
    assert len(SUITES["final"].seeds) >= 3 and len(SUITES["paper"].seeds) >= 3


def test_the_papers_recipes_are_the_papers():
    """MaskAlign's settings as PAPER.md has them: constant, to the end, two layers; and what its ablations change."""
    base = vars(recipe_config(RECIPES["repa"]).model) | vars(recipe_config(RECIPES["repa"]).method)
    token = {"class_token": True, "class_token_dim": 64}
    mixing = {"mixer": "attention", "mixer_layers": 2}
    changes = {
        "reg": token,
        "maskalign": {**token, **mixing, "keep_ratio": 0.75},
        "repa-maskalign": {**mixing, "keep_ratio": 0.75},
        "maskalign-mask0": {**token, **mixing, "keep_ratio": 1.0},
        "maskalign-mask0.75": {**token, **mixing, "keep_ratio": 0.25},
        "maskalign-layers0": {**token, "mixer": "none", "keep_ratio": 0.75},
        "maskalign-layers3": {**token, **mixing, "mixer_layers": 3, "keep_ratio": 0.75},
    }
    for name, changed in changes.items():
        config = recipe_config(RECIPES[name])
        assert vars(config.model) | vars(config.method) == base | changed, name
    assert base["align_weight"] == 0.5 and base["class_weight"] == 0.03
    assert {"reg", "maskalign", "maskalign-layers0"} < set(SUITES["ablations"].recipes)


def test_phases_follow_the_schedules():
    settings = {**RECIPES["constant"], "method.align_weight": "{kind: step, start: 0.5, end: 0.0, begin: 0.25}"}
    config = recipe_config(settings)
    assert phases(config, 64) == {Phase(32, True, None): 0, Phase(32, False, None): 0.25, Phase(64, False, None): 0.9}
    assert phase_at(config, 64, 0.8999).keep == 32 and phase_at(config, 64, 0.9).keep == 64


def calibration(config, times):
    """A calibration in which the phases of a recipe take the given times REPA's 0.5 s."""
    steps = {key_of(config, phase): {"x_repa": times[phase]} for phase in phases(config, 64)}
    return Calibration({"repa_seconds": 0.5, "steps": steps, "threads": 1})


def test_a_budget_of_seconds_is_the_sum_over_steps():
    config = recipe_config(RECIPES["constant"])
    clock = calibration(config, {Phase(32, True, None): 0.5, Phase(64, True, None): 1.0})
    seconds = clock.seconds(config, 64, 100)
    assert len(seconds) == 101 and seconds[0] == 0
    assert seconds[90] == pytest.approx(90 * 0.25) and seconds[100] == pytest.approx(90 * 0.25 + 10 * 0.5)
    # Of 37 steps, 34 begin in the first 0.9 of the run: 34 * 0.25 + 3 * 0.5 = 10.
    assert clock.steps_within(config, 64, 10.0) == 37 and clock.steps_within(config, 64, 10.0, multiple=10) == 30
    assert clock.steps_within(config, 64, 9.99) == 36
    with pytest.raises(UsageError, match="give more"):
        clock.steps_within(config, 64, 0.1)
    other = recipe_config({**RECIPES["constant"], "model.width": 64})
    assert clock.missing({"same": config, "other": other}, 64) == ["other"]


@pytest.mark.parametrize(
    "recipe", ["repa", "reg", "maskalign", "maskalign-fast", "maskalign-fast-class", "sit", "sprint", "loss-only"]
)
def test_tflop_are_those_that_torch_counts(recipe):
    from torch.utils.flop_counter import FlopCounterMode

    from maskalign.checkpoints.build import build_model
    from maskalign.checkpoints.spec import ModelSpec
    from maskalign.config import DataFacts

    settings = {"model.attention": "math", "training.batch_size": 2, **RECIPES[recipe]}
    config = recipe_config(settings)
    facts = DataFacts(input_size=32, in_channels=3, num_classes=10, teachers=[("efficientnet-lite0", True)])
    manifest = SimpleNamespace(teachers={"efficientnet-lite0": {"dim": 320, "class_token": {"dim": 320}}})
    class_dim = 64 if config.model.class_token else None
    model = build_model(config, ModelSpec(32, 3, 10, [320], class_dim))
    token = torch.randn(2, 64) if class_dim else None
    for phase, progress in phases(config, 64).items():
        assert phase == phase_at(config, 64, progress)
        subset = None if phase.keep == 64 else torch.arange(phase.keep).expand(2, -1)
        with FlopCounterMode(display=False) as counter:
            model(
                torch.randn(2, 3, 32, 32), torch.rand(2), torch.zeros(2, dtype=torch.int64), subset, None,
                phase.aligned, token,
            )  # fmt: skip
        counted = 3 * counter.get_total_flops() / 1e12
        assert step_tflop(config, facts, manifest, phase) == pytest.approx(counted, rel=1e-9)


def test_parts_of_the_data(data, images):
    work, train, test = data
    assert Manifest.load(train).num_samples == 24 and Manifest.load(test).num_samples == 8
    assert "efficientnet-lite0" in Manifest.load(train).teachers
    assert prepare(str(images), work / "data" / "tiny", "efficientnet-lite0", quiet=True) == (train, test)
    # A built data set has no parts: the last shards are held out, and it stays as it was.
    before = Path(train, "manifest.json").read_bytes()
    with pytest.raises(UsageError, match="one shard"):
        prepare(train, work / "data" / "again", "efficientnet-lite0", quiet=True)
    assert Path(train, "manifest.json").read_bytes() == before


def test_heldout_losses_against_the_definition():
    """A model that predicts nothing has the loss |eps - x|^2, and one that knows the teacher has cosine 1."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8, generator=generator)
    tokens = torch.randn(10, 4, 5, generator=generator).half()
    arrays = {"images": images, "labels": torch.zeros(12, dtype=torch.int64), "tokens": tokens}
    heldout = SimpleNamespace(arrays=arrays, teacher=SimpleNamespace(grid=(2, 2)))
    seen = []

    def model(x, t, labels):
        rows = slice(sum(map(len, seen)), sum(map(len, seen)) + len(x))
        seen.append(x)
        return SimpleNamespace(velocity=torch.zeros_like(x), aligned=[2.5 * tokens[rows].float()])

    model.grid, model.class_dim = (2, 2), None
    found = heldout_losses(model, heldout, [0.0], batch=4)
    assert [len(x) for x in seen] == [4, 4, 2] and found["cosine", 0.0] == pytest.approx(1, abs=1e-6)
    clean = images.double() / 127.5 - 1
    torch.testing.assert_close(torch.cat(seen).double(), clean, rtol=0, atol=1e-6)  # nothing is noised at time 0
    # E|eps - x|^2 = 1 + E|x|^2, up to the noise of 1,920 draws.
    assert found["velocity_loss", 0.0] == pytest.approx(1 + float(clean.square().mean()), abs=0.2)
    seen.clear()
    assert heldout_losses(model, heldout, [1.0], batch=10)["velocity_loss", 1.0] == pytest.approx(
        float((torch.cat(seen).double() - clean).square().mean()), rel=1e-5
    )


def test_time_to_a_target():
    points = [(1.0, 10.0, 5, 0.9), (2.0, 20.0, 10, 0.5), (4.0, 40.0, 20, 0.4)]
    assert time_to(points, 0.7) == 1.5 and time_to(points, 0.45) == 3.0 and time_to(points, 0.45, axis=1) == 30
    assert time_to(points, 1.0) == 1.0 and time_to(points, 0.1) is None
    assert time_to([(1.0, 1.0, 1, 0.2), (3.0, 3.0, 3, 0.6)], 0.4, low=False) == 2.0


def rows_of(curves):
    """Rows of the CSV from {(recipe, seed, share): [(seconds, loss)]}."""
    return [
        dict(data="tiny", recipe=recipe, seed=seed, share=share, run_steps=len(points), step=k + 1, seconds=seconds,
             tflop=seconds, metric="velocity_loss", time="", value=value)
        for (recipe, seed, share), points in curves.items() for k, (seconds, value) in enumerate(points)
    ]  # fmt: skip


def test_the_table_counts_time_to_repas_quality_over_all_shares():
    rows = rows_of({
        ("repa", 0, 1.0): [(5, 0.6), (10, 0.4)], ("repa", 1, 1.0): [(5, 0.7), (10, 0.5)],  # target 0.45 at 10 s
        ("fast", 0, 1.0): [(5, 0.55), (10, 0.3)], ("fast", 0, 0.6): [(6, 0.42)],
        ("fast", 1, 1.0): [(5, 0.5), (10, 0.35)], ("slow", 0, 1.0): [(5, 0.9), (10, 0.8)],
    })  # fmt: skip
    ratios = ratios_to_repa(rows, "velocity_loss")
    assert ratios["fast"] == [pytest.approx(0.6), pytest.approx((5 + 5 * 0.05 / 0.15) / 10)]
    assert ratios["slow"] == [None]
    lines = {line.split()[0]: line for line in table(rows).splitlines()}
    assert "0.3250 [0.3000, 0.3500] *" in lines["fast"]  # both seeds beat both of REPA's
    assert ">1" in lines["slow"] and "*" not in lines["slow"] and "*" not in lines["repa"]


def dots(panel):
    """The (x, y) of a panel's dots, sorted."""
    lines = [line for line in panel.lines if line.get_marker() == "o"]
    return sorted(pair for line in lines for pair in zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_plots_show_every_seed():
    runs = {("repa", 0, 1.0): [(10, 0.4)], ("repa", 1, 1.0): [(10, 0.5)], ("maskalign", 0, 1.0): [(9, 0.3)]}
    (panel,) = draw_ends(rows_of(runs)).axes
    assert dots(panel) == [(0.3, 1), (0.4, 0), (0.5, 0)]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["repa", "maskalign"]
    assert panel.lines[0].get_xdata() == pytest.approx([0.45, 0.45])  # REPA's mean
    runs = {key: [(5, 0.9), *points] for key, points in runs.items()} | {("maskalign", 0, 0.6): [(3, 0.9), (6, 0.6)]}
    seconds, tflop = draw_curves(rows_of(runs)).axes
    assert dots(seconds) == dots(tflop) == [(6, 0.6), (9, 0.3), (10, 0.4), (10, 0.5)]
    assert [text.get_text() for text in seconds.get_legend().get_texts()] == [
        "repa", "maskalign", "maskalign, planned for 0.6",
    ]  # fmt: skip


def test_own_recipes():
    name, settings = own_recipe("mine=maskalign-fast: --model.mixer none --method.subset grid")
    assert name == "mine"
    assert settings == {**RECIPES["maskalign-fast"], "model.mixer": "none", "method.subset": "grid"}


@pytest.mark.parametrize(
    "more, match",
    [
        (["--suite", "finale"], "no suite"),
        (["--recipes", "repa,maskaligned"], "no recipe 'maskaligned'"),
        (["--recipe", "mine --model.mixer none"], "NAME:"),
        (["--recipe", "mine=ours: --model.mixer none"], "no recipe 'ours'"),
        (["--set", "model.width"], "KEY=VALUE"),
        (["--set", "model.wdth=3"], "model.width"),
        (["--seeds", "one"], "whole numbers"),
        (["--rate", "repo=0.1"], "NAME=RATE"),
        (["--suite", "paper"], "no learning rate for repa .* run --suite rates first"),
        (["--suite", "ablations", "--rate", "reg=0.1"], "no learning rate for maskalign"),
    ],
)
def test_wrong_options_before_any_work(more, match, tmp_path):
    with pytest.raises(UsageError, match=match):
        main(["--data", str(tmp_path / "none"), "--work", str(tmp_path / "work"), "--out", str(tmp_path), *more])
    assert not (tmp_path / "work").exists()


def test_seconds_need_a_calibration_first(data, images, tmp_path):
    argv = words(images, data[0], tmp_path)
    argv = [word for k, word in enumerate(argv) if word != "--steps" and argv[k - 1] != "--steps"]
    with pytest.raises(UsageError, match="--calibrate first"):
        main(argv)


@pytest.fixture
def calibration_file(data):
    """The file of the calibration, removed at the end: the other tests of this module give a budget of steps."""
    path = data[0] / "calibration-tiny.json"
    yield path
    path.unlink(missing_ok=True)


@pytest.mark.slow
def test_calibration_is_interleaved_stored_and_added_to(data, images, tmp_path, calibration_file):
    argv = words(images, data[0], tmp_path, "--rounds", "3", "--calibrate")
    main(argv)
    first = json.loads(calibration_file.read_text())
    labels = {entry["label"]: entry for entry in first["steps"].values()}
    parts = phases(recipe_config(RECIPES["maskalign-fast"]), 64)
    names = {f"maskalign-fast {part.keep}/64" + ("" if part.aligned else " no alignment") for part in parts}
    assert len(names) > 1  # a recipe that changes over its training
    assert set(labels) == {"repa 64/64", *names} and labels["repa 64/64"]["x_repa"] == 1
    assert first["repa_seconds"] > 0 and first["threads"] == 1 and "CPU time" in first["clock"]
    main([*argv, "--recipe", "grid=maskalign-fast: --method.subset grid"])
    second = json.loads(calibration_file.read_text())
    assert all(second["steps"][key] == entry for key, entry in first["steps"].items())
    added = {entry["label"] for key, entry in second["steps"].items() if key not in first["steps"]}
    assert added == {name.replace("maskalign-fast", "grid") for name in names}
    assert second["repa_seconds"] == first["repa_seconds"]
    with pytest.raises(UsageError, match="--recalibrate"):
        main([*argv, "--set", "model.depth=7", "--set", "method.align_depth=2"])


def run(argv, runner=("-m", "benchmarks.convergence.run")):
    script = "import sys; from benchmarks.convergence import command as c; "
    script += "c.RUN = (sys.executable, *eval(sys.argv.pop(1))); "
    return subprocess.Popen(
        [sys.executable, "-c", script + "sys.exit(c.command())", repr(runner), *argv], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_runs_are_the_same_after_a_kill_and_with_other_jobs(data, images, tmp_path):
    """A run that was stopped, one that was killed, and another number of jobs: the CSV says the same."""
    work, train, _ = data
    whole = words(images, work, tmp_path / "whole")
    main(whole)
    # Another work folder with the same data, where things go wrong.
    other = tmp_path / "work"
    (other / "data").mkdir(parents=True)
    (other / "data" / "tiny").symlink_to(work / "data" / "tiny")
    again = words(images, other, tmp_path / "again", "--jobs", "2")
    process = run(again, (str(Path(__file__).with_name("held_run.py")),))  # its runs wait after step 3 to be stopped
    runs = other / "runs" / "tiny-6steps"
    deadline = time.time() + 480
    while not list(runs.glob("*/held")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 130, process.stdout.read()
    assert list(runs.glob("*/checkpoints/step_00000003"))  # it was in the middle
    assert not list(runs.glob("*/quality-*.json"))
    process = run(again)  # and now the harder way: no time for a checkpoint
    while not list(runs.glob("*/quality-00000002.json")) and time.time() < deadline and process.poll() is None:
        time.sleep(0.02)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"benchmarks.convergence.run" in command and any(str(runs).encode() in word for word in command):
            with suppress(ProcessLookupError):  # it may have ended since
                os.kill(int(path.parent.name), signal.SIGKILL)
    process.communicate(timeout=240)
    process = run(again)
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    name = "convergence-screening-tiny-steps.csv"
    undisturbed, disturbed = (read_rows(tmp_path / folder / name) for folder in ("whole", "again"))
    assert len(undisturbed) == len(disturbed)
    for one, other in zip(undisturbed, disturbed, strict=True):
        # The encoder's convolutions sum in an order that depends on where the memory lies: the sixth digit may differ.
        tolerance = 1e-4 if one["metric"] in ("frechet", "kernel") else 1e-5
        assert one["value"] == pytest.approx(other["value"], rel=tolerance)
        assert {**one, "value": 0} == {**other, "value": 0}
    check_rows(tmp_path / "whole" / name)
    assert "time to REPA's loss" in output.strip().splitlines()[-3]
    assert (tmp_path / "again" / name).with_suffix(".png").stat().st_size > 10_000
    assert all(len(list(run.glob("checkpoints/step_*"))) == 1 for run in runs.iterdir())
    # Finished runs are not repeated; another measurement of them is another run.
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.csv")}
    main(again)
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/metrics.csv")} == before
    with pytest.raises(UsageError, match="another samples"):
        main([*again, "--samples", "7"])


def test_a_run_is_known_again_from_a_checkout_elsewhere(tmp_path):
    def job(root, **more):
        return {"arguments": ["--config", f"{root}/base.yaml", "--seed", "0", "--run_dir", f"{root}/run"], **more}

    write_job(tmp_path, job("/here", steps=7))
    write_job(tmp_path, job("/there", steps=7))
    assert read_job(tmp_path)["arguments"][1] == "/there/base.yaml"
    with pytest.raises(UsageError, match=r"another steps \(7, now 8\)"):
        write_job(tmp_path, job("/there", steps=8))
    other = job("/there", steps=7)
    other["arguments"][3] = "1"
    with pytest.raises(UsageError, match=r"another --seed \(0, now 1\)"):
        write_job(tmp_path, other)


def check_rows(path):
    """The CSV has every number once, and the mean over times is the mean."""
    rows = read_rows(path)
    with open(path, newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    # Per run: 3 points with 10 times and a mean of three metrics, and two distances at the last point.
    assert len(rows) == 2 * (3 * 3 * 11 + 2)
    for recipe in ("repa", "maskalign-fast"):
        losses = [row for row in rows if row["recipe"] == recipe and row["metric"] == "velocity_loss"]
        for step in (2, 4, 6):
            by_time = {row["time"]: row["value"] for row in losses if row["step"] == step}
            assert len(by_time) == 11 and by_time.pop("") == pytest.approx(np.mean(list(by_time.values())), rel=1e-4)
            assert all(0 < value < 10 for value in by_time.values())
    assert all(row["tflop"] > 0 and row["seconds"] is None for row in rows)
    by_weights = [{(row["recipe"], row["step"], row["time"]): row["value"] for row in rows if row["metric"] == metric}
                  for metric in ("velocity_loss", "raw_velocity_loss")]  # fmt: skip
    assert by_weights[0].keys() == by_weights[1].keys() and by_weights[0] != by_weights[1]
    frechet = [row["value"] for row in rows if row["metric"] == "frechet"]
    assert len(frechet) == 2 and all(value > 0 for value in frechet)


def test_evaluation_sees_all_tokens():
    """What is measured is the full-token model, whatever it was trained on."""
    model = SiT(input_size=8, patch_size=2, depth=2, width=16, heads=2, teacher_dims=(5,), align_depth=1,
                projector_dim=8, mixer_hidden=4, num_classes=3, in_channels=3).eval()  # fmt: skip
    arrays = {
        "images": torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8),
        "labels": torch.zeros(4, dtype=torch.int64),
        "tokens": torch.randn(4, 16, 5).half(),
    }
    heldout = SimpleNamespace(arrays=arrays, teacher=SimpleNamespace(grid=(4, 4)))
    found = heldout_losses(model, heldout, [0.3, 0.7])
    assert set(found) == {(metric, at) for metric in ("velocity_loss", "cosine") for at in (0.3, 0.7)}
    assert all(np.isfinite(value) for value in found.values())
