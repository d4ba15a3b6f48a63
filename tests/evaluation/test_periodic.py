"""The evaluation during training: the numbers of the command, at every step once, without a trace in the training."""

import csv
import json
import os
import subprocess
import sys

import pytest

from maskalign.evaluation import history
from tests.tiny_runs import train_on, write_data_set

LITE = "efficientnet-lite0"
GAP_NAMES = (
    "align_loss", "stability_gap", "stability_gap_error", "stability_gap_matched", "stability_gap_matched_error",
)  # fmt: skip
LIGHT = dict(evaluate__every=2, evaluate__images=16, evaluate__samples=6, evaluate__steps=2, evaluate__reference=16)


def test_rows_of_a_run_are_the_commands_numbers(data, tmp_path, command):
    plain, run = tmp_path / "plain", tmp_path / "run"
    train_on(data, plain, training__max_steps=5)
    train_on(data, run, training__max_steps=3, training__checkpoint_every=3, training__tensorboard="true", **LIGHT)
    assert [row["step"] for row in history.read_history(run / history.FILE_NAME)] == [2, 3]
    # It goes on from step 3: the row of that step is there, and stays once.
    train_on(data, run, curves=True, training__max_steps=5, training__tensorboard="true", **LIGHT)
    rows = history.read_history(run / history.FILE_NAME)
    assert [row["step"] for row in rows] == [2, 3, 4, 5] and all(row["time"] > 0 for row in rows)

    def losses(folder):
        with open(folder / "metrics.csv", newline="") as file:
            return [(row["step"], row["loss"], row["grad_norm"]) for row in csv.DictReader(file)]

    assert losses(run) == losses(plain)  # bit for bit: nothing of the training depends on the evaluation
    status, out, err = command(
        "evaluate", run, "--data", data, "--samples", 6, "--steps", 2, "--reference", 16, "--held-out-images", 16,
        "--allow-singular", "--precision", "fp32", "--progress", "false",
    )  # fmt: skip
    assert status == 0, err
    report = json.loads((run / "evaluation.json").read_text())
    # Six pictures have no covariance: no Frechet distance. All else is there, and the same.
    assert f"frechet[{LITE}]" not in rows[-1]
    measures = ("velocity_loss", "cosine", *GAP_NAMES)
    for key in (f"kernel[{LITE}]", f"kernel_std[{LITE}]", *(f"held_out_{name}" for name in measures)):
        assert rows[-1][key] == pytest.approx(report["metrics"][key], rel=1e-5, abs=1e-7), key
    for name, values in report["held_out"].items():
        assert {place: rows[-1][f"{name}[{place}]"] for place in values} == pytest.approx(values, rel=1e-5, abs=1e-7)
    assert rows[0]["held_out_velocity_loss"] != rows[-1]["held_out_velocity_loss"]
    assert (run / "curves.png").stat().st_size > 20_000
    tags = _tensorboard_tags(run / "tensorboard")
    assert {f"evaluate/{name}" for name in (f"kernel[{LITE}]", *(f"held_out_{name}" for name in measures))} <= tags
    assert rows[-1]["held_out_align_loss"] == -rows[-1]["held_out_cosine"]
    assert rows[-1]["held_out_stability_gap"] != 0 < rows[-1]["held_out_stability_gap_error"]
    assert "stability gap" in out


def _tensorboard_tags(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return set(events.Tags()["scalars"])


GAP = {f"held_out_{name}" for name in GAP_NAMES}


@pytest.mark.parametrize(
    "name", ["class token", "alignment ended", "no alignment", "no alignment, class token", "conv"]
)
def test_which_runs_log_the_gap(tmp_path, name):
    """Models with and without a class token, also after the alignment has ended; not those that are never aligned."""
    changes = {
        "class token": dict(model__class_token="true", model__mixer="attention"),
        "alignment ended": dict(method__align_weight="{kind: step, start: 0.5, end: 0.0, begin: 0.4}"),
        "no alignment": dict(method__align_weight=0),
        "no alignment, class token": dict(method__align_weight=0, model__class_token="true"),
        "conv": dict(model__projector="conv", method__route="none"),
    }[name]
    write_data_set(tmp_path / "data", class_token=True)
    train_on(tmp_path / "data", tmp_path / "run", training__max_steps=2, **LIGHT | dict(evaluate__samples=0) | changes)
    (row,) = history.read_history(tmp_path / "run" / history.FILE_NAME)
    expected = {"class token": GAP, "alignment ended": GAP, "conv": {"held_out_align_loss"}}.get(name, set())
    assert {key for key in row if key in GAP} == expected
    assert ("held_out_class_velocity_loss" in row) == ("class token" in name)


def test_held_out_data_and_parts_left_out(data, tmp_path):
    write_data_set(tmp_path / "other", samples=24, seed=3)
    settings = LIGHT | dict(training__max_steps=2, evaluate__data=tmp_path / "other", evaluate__samples=0)
    train_on(data, tmp_path / "a", **settings)
    train_on(data, tmp_path / "b", **settings | dict(evaluate__data=data))
    rows = [history.read_history(tmp_path / name / history.FILE_NAME) for name in "ab"]
    assert [len(part) for part in rows] == [1, 1]
    assert rows[0][0]["held_out_velocity_loss"] != rows[1][0]["held_out_velocity_loss"]
    assert not any(key.startswith(("kernel", "frechet")) for key in rows[0][0])


def test_wrong_settings_before_the_training(data, tmp_path, command):
    from tests.tiny_runs import arguments

    write_data_set(tmp_path / "small", samples=12, size=8, grid=(2, 2))
    for changes, match in [
        (dict(evaluate__data=tmp_path / "small"), "evaluate.data: "),
        (dict(evaluate__data=tmp_path / "none"), "does not exist"),
        (dict(evaluate__teacher="dinov3"), "no teacher is called"),
        (dict(evaluate__samples=1), "evaluate.samples: 1"),
        (dict(evaluate__every=-1), "evaluate.every: -1"),
        (dict(evaluate__evry=1), "evaluate.every"),
    ]:
        status, out, err = command("train", *arguments(data, tmp_path / "run", **LIGHT | changes))
        assert status == 2 and len(err) == 1 and match in err[0], (changes, err)
        assert not (tmp_path / "run").exists()


def test_history_is_rewritten_from_a_step(tmp_path):
    path = tmp_path / history.FILE_NAME
    history.drop_after(path, 3)
    assert history.read_history(path) == []
    for step in (2, 4, 6):
        history.add_to_history(path, {"step": step, "time": 0.5 * step, "a": 1 / step})
    history.add_to_history(path, {"step": 4, "time": 3.0, "b": 7.0})  # of other settings
    assert history.read_history(path) == [
        {"step": 2, "time": 1.0, "a": 0.5}, {"step": 4, "time": 3.0, "b": 7.0},
    ]  # fmt: skip
    history.drop_after(path, 3)
    assert [row["step"] for row in history.read_history(path)] == [2]
    history.drop_after(path, 0)
    assert not path.exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_ranks_measure_what_one_process_does(data, tmp_path, cache):
    """Under FSDP all ranks draw and measure together, and one of them writes."""
    from tests.tiny_runs import arguments

    settings = LIGHT | dict(training__max_steps=2, training__device="cpu")
    train_on(data, tmp_path / "one", **settings)
    words = arguments(data, tmp_path / "two", parallel__plan="fsdp", **settings)
    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "maskalign",
         "train", *words],
        capture_output=True, text=True, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    one, two = (history.read_history(tmp_path / name / history.FILE_NAME) for name in ("one", "two"))
    assert len(one) == len(two) == 1
    for row in (one[0], two[0]):
        row.pop("time")
    assert two[0] == pytest.approx(one[0], rel=2e-3, abs=1e-4)
