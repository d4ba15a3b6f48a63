# ruff: noqa: F401, F811 (fixtures are imported)
"""What a run says: what it is, where it begins, how it goes without a bar, and what slows it down."""

import re
import time

import pytest
import torch

from maskalign.training.logs import read_metrics
from maskalign.training.throughput import TeacherShare
from tests.tiny_runs import TEACHER, command, data_set, data_set_of, run


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


def test_the_first_line_says_what_the_run_is(run, capsys, tmp_path):
    run(training__max_steps=1)
    first = lines_of(capsys)[0]
    from maskalign.checkpoints import load_model

    count = sum(p.numel() for p in load_model(tmp_path / "run").parameters())
    for part in (
        str(tmp_path / "run"),
        f"{count:,} parameters",
        "48 images of 3 classes",
        f"teacher {TEACHER} cached",
        "8 of 16 tokens kept (keep ratio 0.5)",
        "batch 8",
        "cpu, fp32",
        "plan none",
    ):
        assert part in first


@pytest.mark.parametrize(
    "changes, part",
    [
        (dict(method__align_weight=0), "no teacher"),
        (dict(parallel__plan="fsdp"), "plan fsdp"),
        (dict(training__precision="bf16"), "cpu, bf16"),
        (dict(method__keep_ratio=0.6), "8 of 16 tokens kept (keep ratio 0.5)"),
        (
            dict(method__keep_ratio="{kind: step, start: 0.3, end: 1.0, begin: 0.5}"),
            "8 to 16 of 16 tokens kept (keep ratio 0.5 to 1)",
        ),
    ],
)
def test_it_says_what_is_really_done(run, capsys, changes, part):
    run(training__max_steps=1, **changes)
    assert part in lines_of(capsys)[0]


def test_class_tokens_and_online_teachers_are_named(run, capsys, data_set_of, tmp_path):
    data_set_of("classes", class_token=True)
    own = dict(data__path=tmp_path / "classes", model__class_token="true", model__mixer="attention")
    run(**own, training__max_steps=1)
    first, *rest = lines_of(capsys)
    assert f"class token of {TEACHER} (6 numbers, cached)" in first
    assert any("class token " in line for line in rest if line.startswith("step 1"))
    online = dict(teacher__names="[timm:vit_tiny_patch16_224]", teacher__weights="random")
    run("online", **online, training__max_steps=1)
    assert "teacher timm:vit_tiny_patch16_224 online" in lines_of(capsys)[0]


def test_the_keep_ratio_is_the_one_after_rounding(run, tmp_path):
    run(training__max_steps=1, method__keep_ratio=0.6)
    assert read_metrics(tmp_path / "run" / "metrics.csv")[0]["keep_ratio"] == 0.5


def test_without_a_bar_there_is_a_line_per_row(run, capsys):
    run(training__max_steps=6, training__log_every=3)
    steps = [line for line in lines_of(capsys) if line.startswith("step ")]
    assert [re.match(r"step (\d+) of 6, ", line).group(1) for line in steps] == ["1", "3", "6"]
    for part in ("loss ", "velocity ", "cosine ", "lr 0.003", "images/s"):
        assert part in steps[-1]


def test_with_a_bar_there_are_no_such_lines(run, capsys):
    run(training__max_steps=2, training__progress="true")
    assert not [line for line in lines_of(capsys) if line.startswith("step ")]


def test_where_it_resumes_is_said(run, capsys, tmp_path):
    run(training__max_steps=2)
    assert not any("resumed" in line for line in lines_of(capsys))
    run(training__max_steps=3)
    assert f"resumed from step 2 of {tmp_path / 'run' / 'checkpoints' / 'step_00000002'}" in lines_of(capsys)


def share_told(features, step, online=True, steps=20):
    told = []
    share = TeacherShare(torch.device("cpu"), online, told.append)
    for _ in range(steps):
        with share.features():
            time.sleep(features)
        with share.step():
            time.sleep(step)
    return told


def test_a_teacher_that_takes_most_of_a_step_is_named_once(run, capsys):
    (share,) = share_told(0.008, 0.002)
    assert 0.6 < share < 0.95
    assert not share_told(0.001, 0.008) and not share_told(0.008, 0.001, online=False)
    # A tiny student with a network of real size before it.
    online = dict(teacher__names="[timm:vit_tiny_patch16_224]", teacher__weights="random", teacher__mode="online")
    run(**online, training__max_steps=12)
    (line,) = [line for line in lines_of(capsys) if "of a step; maskalign" in line]
    assert "timm:vit_tiny_patch16_224" in line and "maskalign data encode --data " in line


def bar_at(tmp_path, step, seconds, columns=80, **training):
    """The progress bar of a run at a step, as 80 columns show it."""
    from tqdm import tqdm

    from maskalign.config import Config
    from maskalign.training.run_log import RunLog

    config = Config(run_dir=str(tmp_path))
    for key, value in {"loggers": [], "progress": True, **training}.items():
        setattr(config.training, key, value)
    log = RunLog(config, 0, 0.0, is_main=True)
    log.advance(step, seconds)
    row = dict.fromkeys(("align_loss", "tflops", "mfu", "data_wait", "comm_seconds", "peak_memory_mib"), 1.0)
    log.bar.set_postfix_str(f"step {step}, 12.3 images/s, " + ", ".join(f"{key} {row[key]}" for key in row))
    shown = tqdm.format_meter(**{**log.bar.format_dict, "ncols": columns, "elapsed": 10.0})
    log.close()
    return shown


@pytest.mark.parametrize(
    "step, seconds, training, percent, left",
    [
        (50, 10.0, {"max_steps": 200}, 25, "00:30"),
        (50, 10.0, {"max_steps": 200, "max_seconds": 20.0}, 50, "00:10"),
        (150, 10.0, {"max_steps": 200, "max_seconds": 40.0}, 75, "00:03"),
        (200, 10.0, {"max_steps": 200, "max_seconds": 40.0}, 100, "00:00"),
    ],
    ids=["steps", "seconds-first", "steps-first", "done"],
)
def test_the_bar_follows_the_limit_that_ends_first(tmp_path, step, seconds, training, percent, left):
    shown = bar_at(tmp_path, step, seconds, **training)
    assert f"{percent}%" in shown and f"{left} left" in shown, shown
    assert len(shown) <= 80 and f"step {step}" in shown and "12.3 images/s" in shown, shown
