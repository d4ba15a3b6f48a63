"""The loop end to end on a small data set: what it leaves, that it goes on exactly, and how it fails."""

import csv
import math
import os
import signal
import statistics
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from maskalign.checkpoints import load, load_model
from maskalign.checkpoints.layout import complete_checkpoints
from maskalign.errors import RunError, UsageError
from maskalign.training.logs import read_metrics


def losses(path):
    return {
        row["step"]: (row["loss"], row["velocity_loss"], row["align_loss"], row["grad_norm"])
        for row in read_metrics(path)
    }


def tensors(run_dir):
    from safetensors.torch import load_file

    newest = complete_checkpoints(run_dir)[-1]
    return {name: t for file in sorted(newest.glob("*.safetensors")) for name, t in load_file(file).items()}


def test_a_run_leaves_what_the_design_promises(run, tmp_path):
    result = run(
        curves=True,
        training__tensorboard="true",
        training__checkpoint_every=2,
        training__keep_checkpoints=2,
        training__sample_every=3,
    )
    folder = tmp_path / "run"
    assert result == dict(step=6, seconds=result["seconds"], run_dir=str(folder), finished=True)
    for name in ("config.yaml", "metrics.csv", "curves.png", "tensorboard"):
        assert (folder / name).exists(), name
    assert [p.name for p in complete_checkpoints(folder)] == ["step_00000004", "step_00000006"]
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["step_00000003.png", "step_00000006.png"]
    for picture in [folder / "curves.png", *(folder / "samples").iterdir()]:
        assert len(Image.open(picture).convert("RGB").getcolors(1 << 20)) > 20, picture
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    wanted = (
        "step time loss velocity_loss align_loss grad_norm lr keep_ratio images_per_second peak_memory_mib data_wait"
    )
    assert set(wanted.split()) <= set(rows[0]) and [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert all(math.isfinite(float(value)) for value in row.values())
        expected = float(row["velocity_loss"]) + 0.5 * float(row["align_loss"])
        assert float(row["loss"]) == pytest.approx(expected, rel=1e-5)
    assert any(p.stat().st_size > 500 for p in (folder / "tensorboard").iterdir())


def test_training_learns(run, tmp_path):
    run(training__max_steps=60, method__keep_ratio=1.0)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    first, last = rows[:6], rows[-6:]
    assert sum(r["align_loss"] for r in last) < sum(r["align_loss"] for r in first) - 0.02 * 6
    assert sum(r["velocity_loss"] for r in last) < sum(r["velocity_loss"] for r in first)


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resuming_is_bit_for_bit_the_undisturbed_run(run, tmp_path, stop_at):
    own = dict(training__max_steps=9, method__keep_ratio='{"kind": "step", "start": 0.5, "end": 1, "begin": 0.6}')
    run("whole", **own)
    run("parts", **own, training__checkpoint_every=stop_at)
    # A crash after step `stop_at`: later checkpoints are gone, the metrics are ahead of the checkpoint.
    for later in complete_checkpoints(tmp_path / "parts")[1:]:
        (later / "COMPLETE").unlink()
    result = run("parts", **own)
    assert result["finished"] and result["step"] == 9
    assert losses(tmp_path / "parts" / "metrics.csv") == losses(tmp_path / "whole" / "metrics.csv")
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_accumulation_gives_the_same_losses(run, tmp_path):
    run("one", training__batch_size=16)
    run("four", training__batch_size=16, training__accumulation=4)
    one, four = losses(tmp_path / "one" / "metrics.csv"), losses(tmp_path / "four" / "metrics.csv")
    for step in one:
        assert one[step] == pytest.approx(four[step], rel=1e-5), step


def test_loader_processes_do_not_change_the_run(run, tmp_path):
    run("none")
    run("two", data__num_workers=2)
    assert losses(tmp_path / "none" / "metrics.csv") == losses(tmp_path / "two" / "metrics.csv")


@pytest.mark.parametrize(
    "changes, kept",
    [
        (dict(method__route="[1, 2]", method__restore="fuse", model__mixer="none", method__align_weight=0), 8),
        (dict(method__route="none", model__mixer="none"), 8),
        (
            dict(
                method__route="[0, 1]", method__restore="bypass", model__mixer="depthwise_conv", method__subset="grid"
            ),
            8,
        ),
        (
            dict(
                model__mixer="attention", method__align_ratio=0.5, method__keep_multiple=1, method__subset="block",
                method__keep_ratio=0.7,
            ),
            11,
        ),
        (
            dict(
                objective__path="cosine", objective__time="lognormal", model__projector="conv", method__keep_ratio=1.0
            ),
            16,
        ),
        (dict(training__precision="bf16"), 8),
    ],
    ids=["sprint", "loss-only", "tread", "align-ratio", "cosine-conv", "bf16"],
)  # fmt: skip
def test_recipes_keep_their_tokens_and_learn(run, tmp_path, monkeypatch, changes, kept):
    """The number K that a step draws, a velocity loss that falls, and an alignment that is there or not."""
    from maskalign.training.step import TrainStep

    drawn, own = set(), TrainStep.draws

    def draws(self, *args, **kwargs):
        result = own(self, *args, **kwargs)
        drawn.add(16 if result.subset is None else result.subset.shape[1])
        return result

    monkeypatch.setattr(TrainStep, "draws", draws)
    assert run(**changes, training__max_steps=40, optimizer__lr=0.01)["finished"] and drawn == {kept}
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert {row["keep_ratio"] for row in rows} == {kept / 16}
    first, last = (statistics.median(row["velocity_loss"] for row in part) for part in (rows[:10], rows[-10:]))
    assert last < first
    aligns = "method__align_weight" not in changes
    assert all((0 < abs(row["align_loss"]) <= 1) == aligns for row in rows)


def test_a_constant_may_be_written_as_a_schedule(run):
    settings = dict(method__keep_ratio="{kind: constant, start: 0.5}", parallel__plan="ddp", training__max_steps=1)
    assert run(**settings)["finished"]


@pytest.mark.parametrize("multiple, said", [(16, True), (8, False)])
def test_a_multiple_that_keeps_all_tokens_is_said(run, caplog, multiple, said):
    run(method__keep_multiple=multiple, training__max_steps=1)
    assert ("keeps all of them" in caplog.text) == said


def test_latents_and_features_on_another_grid(run, data_set_of, tmp_path):
    data_set_of("latents", latent=True, grid=(3, 3))
    assert run(data__path=tmp_path / "latents", model__patch_size=2)["finished"]
    model = load_model(tmp_path / "run")
    assert (model.in_channels, model.input_size, model.num_tokens) == (4, 8, 16)


def test_online_features_are_those_that_encoding_would_cache(run, data_set, tmp_path):
    """The rows of a step, computed from the images, against the same images through the teacher by itself."""
    from maskalign.config import parse_config
    from maskalign.teachers import load_teacher
    from maskalign.training import trainer
    from maskalign.training.preflight import check_data
    from tests.tiny_runs import arguments

    name = "timm:vit_tiny_patch16_224"
    own = dict(teacher__names=f"[{name}]", teacher__weights="random", training__max_steps=2)
    config = parse_config(arguments(data_set, tmp_path / "run", **own))
    made = trainer.Trainer(config, *check_data(config))
    batch = next(iter(made.stream))
    (rows,) = made.step_inputs(batch)["teachers"]
    (source,) = made.features.sources
    alone = load_teacher(name, weights="random", image_size=16)
    alone.encoder.network.load_state_dict(source.teacher.encoder.network.state_dict())
    with torch.no_grad():
        expected = alone(batch["image"])
    assert expected.shape[-1] == 192 == made.model.teacher_dims[0] and rows.shape[:2] == (8, made.model.num_tokens)
    maps = expected.unflatten(1, source.grid).permute(0, 3, 1, 2)
    grid = torch.nn.functional.adaptive_avg_pool2d(maps, made.model.grid)
    torch.testing.assert_close(rows.float(), grid.flatten(2).transpose(1, 2).float(), rtol=1e-4, atol=1e-4)


def test_checkpoints_give_the_model_back(run, tmp_path):
    run()
    loaded = load(tmp_path / "run")
    model, config = loaded.model, loaded.config
    assert loaded.info.step == 6 and not model.training and config.training.max_steps == 6
    stored = tensors(tmp_path / "run")
    for name, p in model.named_parameters():
        assert torch.equal(p, stored[f"ema/{name}"]) and not p.requires_grad
    raw = load_model(complete_checkpoints(tmp_path / "run")[0], ema=False)
    assert all(torch.equal(p, stored[f"model/{name}"]) for name, p in raw.named_parameters())
    assert loaded.info.class_names == ["ant", "bee", "cat"]


def test_time_limited_runs_end_with_their_schedules_complete(run, tmp_path):
    run(
        training__max_steps=100_000,
        training__max_seconds=4.0,
        method__keep_ratio='{"kind": "step", "start": 0.5, "end": 1, "begin": 0.5}',
    )
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows[0]["keep_ratio"] == 0.5 and rows[-1]["keep_ratio"] == 1 and 4 <= rows[-1]["time"] < 12
    assert (
        run(training__max_steps=100_000, training__max_seconds=4.0)["step"] == rows[-1]["step"]
    )  # complete: nothing to do


def test_non_finite_losses_stop_the_run_with_a_clear_line(run, tmp_path):
    with pytest.raises(RunError, match="3 steps in a row.*optimizer.lr"):
        run(optimizer__lr=1e38, optimizer__grad_clip=0, training__max_steps=50, training__max_nonfinite=3)


def test_one_non_finite_step_is_skipped_and_counted(run, tmp_path, monkeypatch):
    from maskalign.training import step as module

    original, calls = module.training_loss, []

    def poisoned(*args, **kwargs):
        losses = original(*args, **kwargs)
        calls.append(1)
        return losses._replace(total=losses.total * float("inf")) if len(calls) == 3 else losses

    monkeypatch.setattr(module, "training_loss", poisoned)
    assert run()["finished"]
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    # A row of a skipped step has no loss, and is left out when metrics are read back as numbers to plot.
    assert rows[-1]["skipped_steps"] == 1 and math.isfinite(rows[-1]["loss"])


def test_resume_never_refuses_a_used_folder(run):
    run(training__max_steps=2)
    with pytest.raises(UsageError, match="training.resume"):
        run(training__max_steps=4, training__resume="never")


def test_a_folder_without_a_checkpoint_is_found_before_torch(run, tmp_path):
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UsageError, match="holds no checkpoint; give a run folder"):
        run(training__resume=tmp_path / "pictures")
    with pytest.raises(UsageError, match="no weights file"):
        run(teacher__mode="online", teacher__weights=tmp_path / "none.pth", teacher__names=["efficientnet-lite0"])


def test_resume_with_another_model_is_refused(run):
    run(training__max_steps=2)
    with pytest.raises(UsageError, match="model.width 16 .now 32."):
        run(training__max_steps=4, model__width=32)


def test_init_from_takes_weights_and_not_the_step(run, tmp_path):
    run("first", model__mixer="none")
    result = run("second", training__init_from=tmp_path / "first", training__max_steps=1, optimizer__lr=1e-12)
    assert result["step"] == 1
    a, b = tensors(tmp_path / "first"), tensors(tmp_path / "second")
    shared = [name for name in a if name.startswith("model/")]
    assert shared and all(torch.allclose(a[name.replace("model/", "ema/")], b[name], atol=1e-9) for name in shared)


def start(argv):
    return subprocess.Popen(
        [sys.executable, "-m", "maskalign", "train", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for_rows(path, count, process, timeout=120):
    end = time.time() + timeout
    while time.time() < end:
        if process.poll() is not None:
            pytest.fail(f"the run ended: {process.communicate()}")
        if path.exists() and len(read_metrics(path)) >= count:
            return
        time.sleep(0.05)
    process.kill()
    pytest.fail(f"no {count} rows within {timeout} s")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_exits_cleanly(command, run, tmp_path, number):
    argv = command(training__max_steps=100_000)
    process = start(argv)
    wait_for_rows(tmp_path / "run" / "metrics.csv", 3, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "stopped at step" in out and "Traceback" not in err
    stopped = int(complete_checkpoints(tmp_path / "run")[-1].name[5:])
    assert read_metrics(tmp_path / "run" / "metrics.csv")[-1]["step"] == stopped
    assert run(training__max_steps=stopped + 2)["step"] == stopped + 2


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_like_an_undisturbed_one(command, run, tmp_path, seed):
    import random

    rng = random.Random(seed)
    own = dict(training__max_steps=40, training__checkpoint_every=3)
    run("whole", **own)
    kills = 0
    for attempt in range(12):
        # Each restart reads with another number of loader processes; equal losses mean equal samples, step by step.
        process = start(command("killed", **own, data__num_workers=rng.choice([0, 1, 2])))
        try:
            process.wait(timeout=rng.uniform(4, 9) if attempt < 8 else 120)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        if process.returncode == 0:
            break
    print(f"{kills} kills")
    assert process.returncode == 0
    assert losses(tmp_path / "killed" / "metrics.csv") == losses(tmp_path / "whole" / "metrics.csv")
    a, b = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_failing_write_keeps_the_checkpoints_before(run, tmp_path, monkeypatch):
    from maskalign.training import saving

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    run(training__max_steps=2)
    monkeypatch.setattr(saving.dcp, "save", full)
    with pytest.raises(RunError, match="No space left"):
        run(training__max_steps=4)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_damaged_newest_checkpoint_is_passed_over(run, tmp_path):
    run(training__max_steps=4, training__checkpoint_every=2)
    newest = complete_checkpoints(tmp_path / "run")[-1]
    file = next(newest.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])
    assert complete_checkpoints(tmp_path / "run")[-1].name == "step_00000002"
    assert run(training__max_steps=4)["step"] == 4
