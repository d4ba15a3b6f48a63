"""A run's numbers do not depend on how many processes share the work, nor by which plan."""

import json
import math

import pytest

from maskalign.training.logs import read_metrics

STEPS = 20
# Subsets of many sizes, a full-token phase, and an alignment that ends (projectors without gradients).
BASE = dict(
    training__max_steps=STEPS,
    training__batch_size=16,
    training__checkpoint_every=1000,
    method__keep_multiple=2,
    method__keep_ratio='{"kind": "linear", "start": 0.25, "end": 1.0, "until": 0.7}',
    method__align_weight='{"kind": "step", "start": 0.5, "end": 0.0, "begin": 0.8}',
)
ZERO2 = dict(parallel__reshard_after_forward="false")
PLANS = {
    "ddp": dict(parallel__plan="ddp"),
    "fsdp": dict(parallel__plan="fsdp"),
    "hsdp": dict(parallel__plan="hsdp", parallel__shard_size=2),
    "ddp-accumulated": dict(parallel__plan="ddp", training__accumulation=4),
    "fsdp-accumulated": dict(parallel__plan="fsdp", training__accumulation=4),
    "hsdp-accumulated": dict(parallel__plan="hsdp", parallel__shard_size=2, training__accumulation=4, **ZERO2),
}
COMPILED = dict(training__compile="true")
# The paper's model: a class token, two mixing layers that drop inside, alignment to the end.
PAPER = dict(
    training__max_steps=STEPS,
    training__batch_size=16,
    training__checkpoint_every=1000,
    model__class_token="true",
    model__mixer="attention",
    method__keep_multiple=2,
    method__keep_ratio=0.75,
)


def rows(path):
    return {row["step"]: row for row in read_metrics(path / "metrics.csv")}


def assert_same(reference, other, what):
    assert reference.keys() == other.keys() and len(reference) == STEPS, what
    for step, row in reference.items():
        for key in ("loss", "velocity_loss", "align_loss", "class_velocity_loss"):
            same = math.isclose(row[key], other[step][key], rel_tol=1e-5, abs_tol=1e-6 if key == "align_loss" else 0)
            assert same, (what, step, key, row[key], other[step][key])
        assert math.isclose(row["grad_norm"], other[step]["grad_norm"], rel_tol=1e-4), (what, step)


@pytest.mark.slow  # the same test with the paper's model below is not
@pytest.mark.distributed
def test_two_processes_give_the_losses_of_one(run, launch, tmp_path):
    run("one", **BASE)
    more = {
        "recomputed": PLANS["fsdp"] | dict(parallel__recompute="selective", parallel__ema_on_cpu="true"),
        "compiled": PLANS["fsdp"] | COMPILED,
    }
    cases = {name: BASE | plan for name, plan in (PLANS | more).items()}
    launch(2, cases)
    for name in cases:
        assert_same(rows(tmp_path / "one"), rows(tmp_path / name), name)
        ranks = json.loads((tmp_path / name / "ranks.json").read_text())
        assert ranks[0] == ranks[1] and ranks[0]["skipped"] == [], name
        last = rows(tmp_path / name)[STEPS]
        assert 0 < last["comm_seconds"] < last["time"] and 0 < last["mfu"] < 1 and last["tflops"] > 0, name


@pytest.mark.slow
@pytest.mark.distributed
def test_four_processes_give_the_losses_of_one(run, launch, tmp_path):
    run("one", **BASE)
    cases = {name: BASE | plan for name, plan in PLANS.items()}
    cases["ddp-compiled"] = BASE | PLANS["ddp"] | COMPILED
    cases["hsdp-compiled"] = BASE | PLANS["hsdp-accumulated"] | COMPILED
    launch(4, cases)
    for name in cases:
        assert_same(rows(tmp_path / "one"), rows(tmp_path / name), name)


@pytest.mark.slow
@pytest.mark.distributed
def test_inductors_code_gives_the_losses_of_eager_blocks_on_two_processes(run, launch, tmp_path):
    run("one", **BASE)
    launch(2, {"fsdp": BASE | PLANS["fsdp"] | COMPILED}, backend="inductor")
    assert_same(rows(tmp_path / "one"), rows(tmp_path / "fsdp"), "fsdp")


@pytest.mark.parametrize("plan", ["ddp", "fsdp", "hsdp"])
def test_a_plan_in_one_process_gives_the_same_losses(run, tmp_path, plan):
    run("one", **BASE)
    run("plan", **BASE, parallel__plan=plan, training__accumulation=4, training__sample_every=10)
    assert_same(rows(tmp_path / "one"), rows(tmp_path / "plan"), plan)
    assert (tmp_path / "plan" / "samples" / "step_00000020.png").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_nan_on_one_rank_makes_all_ranks_skip_the_same_step(launch, tmp_path):
    small = dict(training__max_steps=5, training__batch_size=8)
    plans = {name: small | PLANS[name] for name in ("ddp", "fsdp", "hsdp")}
    plans["bf16"] = small | PLANS["fsdp"] | dict(training__precision="bf16", training__sample_every=2)
    launch(2, plans, poison=2)
    for name in plans:
        ranks = json.loads((tmp_path / name / "ranks.json").read_text())
        assert [rank["skipped"] for rank in ranks] == [[2], [2]], name
        assert ranks[0]["digest"] == ranks[1]["digest"], name
        last = rows(tmp_path / name)[5]
        assert last["skipped_steps"] == 1 and math.isfinite(last["loss"]), name


@pytest.mark.slow
@pytest.mark.distributed
def test_a_compiled_and_sharded_teacher_gives_the_losses_of_a_whole_one(run, launch, tmp_path):
    small = dict(training__max_steps=3, teacher__names="[timm:vit_tiny_patch16_224]", teacher__weights="random")
    run("one", **small)
    launch(2, {"two": small | PLANS["fsdp"] | COMPILED | dict(parallel__shard_teacher_above=1)})
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    for step in (1, 2, 3):
        assert math.isclose(one[step]["loss"], two[step]["loss"], rel_tol=1e-5), step


@pytest.mark.distributed
@pytest.mark.parametrize(
    "plans",
    [("ddp", "fsdp", "hsdp-accumulated", "recomputed"), pytest.param(("compiled",), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_two_processes_give_the_papers_model_the_losses_of_one(run, launch, data_set_of, tmp_path, plans):
    data_set_of("classes", class_token=True)
    paper = PAPER | dict(data__path=tmp_path / "classes")
    run("one", **paper)
    more = {"recomputed": PLANS["fsdp"] | dict(parallel__recompute="block"), "compiled": PLANS["fsdp"] | COMPILED}
    launch(2, {name: paper | (PLANS | more)[name] for name in plans})
    reference = rows(tmp_path / "one")
    assert all(row["class_velocity_loss"] > 0 for row in reference.values())
    for name in plans:
        assert_same(reference, rows(tmp_path / name), name)
