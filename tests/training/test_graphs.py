"""A step as a graph: what is captured, what is copied to it, and when; on a GPU the real thing, elsewhere pretended."""

import json
import math
import os

import pytest
import torch

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import parse_config
from maskalign.objective.draws import Draws
from maskalign.runtime import ranks
from maskalign.runtime.ranks import Placement
from maskalign.training import graphs, trainer
from maskalign.training.logs import read_metrics
from maskalign.training.optimizer import Optimizer
from maskalign.training.plans import Plan, idle_parameters
from maskalign.training.step import MicroBatch, TrainStep
from tests.training.pretended_gpu import pretend

# A large eps: else Adam turns the rounding errors of gradients that are zero (keys' biases) into steps.
SETTINGS = [
    "--model.depth", "3", "--model.width", "24", "--model.heads", "2", "--model.patch_size", "2",
    "--model.projector_dim", "16", "--model.mixer_hidden", "8", "--method.align_depth", "2",
    "--method.keep_multiple", "4", "--optimizer.lr", "0.01", "--optimizer.eps", "0.001",
]  # fmt: skip
STEPS = 12


def train(device, seed, *changes, dtype=torch.float32, graphs=True):
    """Losses, gradient norms and weights of a short run on other images every step, and its `TrainStep`."""
    config = parse_config([*SETTINGS, *changes, "--training.cuda_graph", str(graphs).lower()])
    torch.manual_seed(seed)
    class_dim = 7 if config.model.class_token else None
    spec = ModelSpec(input_size=8, in_channels=3, num_classes=5, teacher_dims=[6], class_dim=class_dim)
    model = build_model(config, spec)
    model.reset_parameters(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    model.to(device)
    optimizer = Optimizer(model, config.optimizer, dtype)
    step = TrainStep(model, optimizer, config, Placement(torch.device(device), dtype))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(STEPS):
        inputs = torch.randn(8, 3, 8, 8, generator=generator).to(device)
        labels = torch.randint(0, 5, (8,), generator=generator).to(device)
        teachers = [torch.randn(8, 16 + bool(class_dim), 6, generator=generator).to(device)]
        class_token = torch.randn(8, class_dim, generator=generator).to(device) if class_dim else None
        if number == 4:
            inputs[0, 0, 0, 0] = float("nan")
        found.append(step(number, number / STEPS, inputs, labels, teachers, class_token=class_token))
    rows = torch.stack([torch.stack([*r[:4], r.grad_norm, r.skipped.float()]) for r in found]).cpu()
    return rows, [p.detach().float().cpu() for p in optimizer.masters + optimizer.ema], step


def assert_same(found, expected, tolerance=1e-6):
    """Learning rate and weight are float32 in a graph and float64 beside it: close, not equal."""
    (rows, weights), (exact_rows, exact_weights) = found, expected
    torch.testing.assert_close(rows, exact_rows, equal_nan=True, rtol=tolerance, atol=tolerance)
    for a, b in zip(weights, exact_weights, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


RISING = ["--method.keep_ratio", "{kind: step, start: 0.5, end: 1.0, begin: 0.5}"]
ENDING = ["--method.align_weight", "{kind: step, start: 0.5, end: 0.0, begin: 0.5}"]
PAPER = ["--model.class_token", "true", "--method.keep_ratio", "0.75"]
KINDS = [[], RISING, ENDING, ["--training.accumulation", "4"], ["--method.align_ratio", "0.5"]]
KINDS += [PAPER, [*PAPER, *RISING[:1], RISING[1], *ENDING, "--training.accumulation", "2"]]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture
def pretended(monkeypatch):
    """Steps on a CPU are captured, see pretended_gpu.py."""
    return pretend(monkeypatch.setattr)


@pytest.mark.parametrize("changes", KINDS)
def test_graphs_compute_what_steps_compute(changes, pretended, seed):
    *expected, _ = train("cpu", seed, *changes, graphs=False)
    *found, step = train("cpu", seed, *changes)
    assert_same(found, expected)
    skipped = expected[0][:, -1]
    assert skipped[4] == 1 and skipped.sum() == 1, "one step had a NaN"
    kinds = 2 if RISING[1] in changes or ENDING[1] in changes else 1
    assert pretended.captures == kinds and step.graphs.launched == graphs.WARM_UP


def test_one_graph_at_a_time_and_every_kind_of_step_is_captured_anew(pretended, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    model = torch.nn.Linear(1, 1)
    plan = Plan(model, parse_config(SETTINGS), Placement(torch.device("cpu"), torch.float32))

    def gradients(micro_batches, align_weight):
        return micro_batches[0].x.sum() * align_weight

    steps = graphs.StepGraphs(gradients, lambda losses, lr: (losses + lr,), plan)
    draws = Draws(*[None] * len(Draws._fields))

    def step(n, weight=1.0, teachers=1):
        """A step on n images with the value 2, and whether it was replayed."""
        z = [torch.zeros(n)] * teachers
        losses, updated = steps([MicroBatch(torch.full((n,), 2.0), torch.zeros(n), z, draws, 1.0, True)], weight, 0.5)
        assert float(losses) == 2 * n * weight and float(updated) == float(losses) + 0.5
        return steps.captured is not None

    assert [step(3) for _ in range(graphs.WARM_UP + 2)] == [False] * graphs.WARM_UP + [True] * 2
    assert step(3, weight=0.25), "the weight is an input of the graph"
    before = len(freed)
    assert not step(5) and len(freed) == before + 1, "the memory is free for the first step of another kind"
    assert [step(5) for _ in range(graphs.WARM_UP)] == [False] * (graphs.WARM_UP - 1) + [True]
    assert [step(3) for _ in range(graphs.WARM_UP + 1)] == [False] * graphs.WARM_UP + [True] and pretended.captures == 3
    assert not step(3, teachers=0), "a step without alignment is another kind"
    step(3, teachers=0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert not step(3, teachers=0), "nothing is captured under the profiler"
    assert step(3, teachers=0)
    steps.release()
    assert steps.captured is None


def refusing(monkeypatch, parts):
    """Captures of these parts of a step fail."""
    record, asked = graphs.StepGraphs._record, []

    def refuse(self, micro_batches):
        asked.append(self.part)
        if self.part in parts:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        return record(self, micro_batches)

    monkeypatch.setattr(graphs.StepGraphs, "_record", refuse)
    return asked


@pytest.mark.parametrize(
    "parts, line",
    [
        ((graphs.STEP, graphs.GRADIENTS), "steps are launched by Python"),
        ((graphs.STEP,), "its update is launched by Python"),
    ],
)
def test_what_cannot_be_captured_is_launched_by_python(parts, line, pretended, seed, monkeypatch, caplog):
    asked = refusing(monkeypatch, parts)
    changes = [*RISING, "--training.accumulation", "2"]
    *found, step = train("cpu", seed, *changes)
    assert_same(found, train("cpu", seed, *changes, graphs=False)[:2])
    assert caplog.text.count("cannot be captured (operation not permitted when stream is capturing)") == 1
    assert caplog.text.count(line) == 1 and "and more" not in caplog.text
    everything = len(parts) == 2
    assert asked == [graphs.STEP, graphs.GRADIENTS] + [] * everything + [graphs.GRADIENTS] * (not everything)
    assert (step.graphs.captured is None) == everything
    step.close()
    assert step.graphs.captured is None


def test_averages_in_host_memory_are_no_part_of_a_graph(pretended, seed, monkeypatch):
    """Here the GPU is pretended, so the optimizer is told that its averages are elsewhere."""
    own = Optimizer.__init__
    whole = train("cpu", seed, graphs=False)[:2]

    def apart(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.averages_apart = True

    monkeypatch.setattr(Optimizer, "__init__", apart)
    *found, step = train("cpu", seed)
    assert step.graphs.captured is not None
    assert_same(found, whole)


def test_who_captures(monkeypatch):
    config = parse_config(SETTINGS)
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    assert graphs.captures(config, gpu)
    assert graphs.captures(config, Placement(torch.device("cuda"), torch.bfloat16, 0, 2, 0, mesh=object()))
    assert graphs.captures(parse_config([*SETTINGS, "--parallel.ema_on_cpu", "true"]), gpu)
    assert not graphs.captures(config, Placement(torch.device("cpu"), torch.float32))
    assert not graphs.captures(parse_config([*SETTINGS, "--training.cuda_graph", "false"]), gpu)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not graphs.captures(config, gpu)


@pytest.mark.parametrize(
    "allocator, given, expected",
    [("expandable_segments:True", None, "0"), ("expandable_segments:True", "1", "1"), ("", None, None)],
)
def test_nccl_registers_no_expandable_segments(monkeypatch, allocator, given, expected):
    for name, value in (("PYTORCH_CUDA_ALLOC_CONF", allocator), ("NCCL_GRAPH_REGISTER", given)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    ranks.join_ranks(torch.device("cuda"))
    assert os.environ.get("NCCL_GRAPH_REGISTER") == expected


def assert_rows(reference, other, what, tolerance=1e-6):
    """Two runs' metrics.csv are the same; a step that was skipped has no loss in either."""
    one, two = (read_metrics(path / "metrics.csv") for path in (reference, other))
    assert [row["step"] for row in one] == [row["step"] for row in two] and one, what
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "velocity_loss", "align_loss", "class_velocity_loss", "grad_norm"):
            same = math.isclose(a[key], b[key], rel_tol=tolerance, abs_tol=tolerance)
            assert same or math.isnan(a[key]) and math.isnan(b[key]), (what, a["step"], key, a[key], b[key])
        assert a["skipped_steps"] == b["skipped_steps"], what


# Warm-up, a capture, a change of K, an alignment that ends, previews, checkpoints, an evaluation of the average.
LONG = dict(
    training__max_steps=30,
    training__batch_size=8,
    training__checkpoint_every=9,
    training__sample_every=20,
    method__keep_multiple=2,
    method__keep_ratio='{"kind": "step", "start": 0.5, "end": 1.0, "begin": 0.5}',
    method__align_weight='{"kind": "step", "start": 0.5, "end": 0.0, "begin": 0.8}',
)
PLANS = {
    "none": dict(),
    "ddp": dict(parallel__plan="ddp"),
    "fsdp": dict(parallel__plan="fsdp"),
    "hsdp": dict(parallel__plan="hsdp", parallel__shard_size=2, parallel__reshard_after_forward="false"),
}


@pytest.mark.parametrize("plan", PLANS)
def test_a_captured_run_in_one_process_is_the_plain_one(plan, run, tmp_path, pretended, monkeypatch):
    own = {**LONG, **PLANS[plan], "parallel__shard_size": "null", "training__accumulation": 2}
    run("plain", **own, training__cuda_graph="false")
    assert pretended.captures == 0
    run("captured", **own, training__cuda_graph="true")
    # DDP is warmed up again when the projectors leave it, and six steps are too few for that.
    assert pretended.captures == (2 if plan == "ddp" else 3)
    assert_rows(tmp_path / "plain", tmp_path / "captured", plan)


@pytest.mark.slow
@pytest.mark.distributed
def test_captured_runs_on_two_ranks_are_the_plain_ones(launch, tmp_path):
    """Step 14 of each run has a NaN on the last rank, within replays: all ranks skip it, and go on replaying."""
    cases = {}
    for name, parts in (("ddp", 2), ("fsdp", 1), ("hsdp", 2)):
        own = LONG | PLANS[name] | dict(training__accumulation=parts)
        cases[f"{name}-plain"] = own | dict(training__cuda_graph="false", training__sample_every=0)
        cases[name] = own | dict(training__cuda_graph="true")
    launch(2, cases, poison=14, pretend_graphs=True)
    for name in ("ddp", "fsdp", "hsdp"):
        of_ranks = json.loads((tmp_path / name / "ranks.json").read_text())
        assert_rows(tmp_path / f"{name}-plain", tmp_path / name, name)
        assert [rank["captures"] for rank in of_ranks] == [2 if name == "ddp" else 3] * 2, name
        assert [rank["skipped"] for rank in of_ranks] == [[14]] * 2, name
        assert of_ranks[0]["digest"] == of_ranks[1]["digest"], name


@pytest.mark.slow
@pytest.mark.distributed
def test_all_ranks_launch_where_one_cannot_capture(launch, tmp_path):
    small = dict(training__max_steps=5, training__batch_size=8)
    cases = {}
    for name in ("ddp", "fsdp"):
        cases[f"{name}-plain"] = small | PLANS[name] | dict(training__cuda_graph="false")
        cases[name] = small | PLANS[name] | dict(training__cuda_graph="true")
    launch(2, cases, pretend_graphs=True, refuse_on=1)
    for name in ("ddp", "fsdp"):
        of_ranks = json.loads((tmp_path / name / "ranks.json").read_text())
        assert_rows(tmp_path / f"{name}-plain", tmp_path / name, name)
        assert all(rank["replays"] == 0 for rank in of_ranks), name


@pytest.mark.parametrize("plan", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_ends_in_the_middle_is_forgotten(plan, where, run, tmp_path, pretended, monkeypatch):
    """A capture that fails inside of a block: the steps after it are those of a run that never tried."""
    own = dict(training__max_steps=14, parallel__plan=plan, training__batch_size=8, model__depth=3)
    run("plain", **own, training__cuda_graph="false")
    failures, trainers = [], []

    def fail(*_):
        failures.append(1)
        raise RuntimeError("a capture went wrong")

    def record(self, compute, stream):
        block = trainers[-1].model.blocks[1]
        if where == "forward":
            handle = block.mlp.register_forward_hook(fail)
        else:
            handle = block.mlp.register_forward_hook(lambda module, inputs, output: output.register_hook(fail) and None)
        try:
            compute()
        finally:
            handle.remove()

    own_init = trainer.Trainer.__init__

    def init(self, *args, **kwargs):
        trainers.append(self)
        own_init(self, *args, **kwargs)

    monkeypatch.setattr(trainer.Trainer, "__init__", init)
    monkeypatch.setattr(pretended, "_record", record)
    run("captured", **own, training__cuda_graph="true")
    assert len(failures) == 2, "of the whole step, and of forward and backward"
    assert_rows(tmp_path / "plain", tmp_path / "captured", plan)


def test_ddp_is_built_over_the_parameters_that_take_part(seed):
    config = parse_config([*SETTINGS, "--method.restore", "fuse", "--method.route", "[1,2]", "--model.mixer", "none"])
    spec = ModelSpec(input_size=8, in_channels=3, num_classes=5, teacher_dims=[6])
    model = build_model(config, spec)
    projector, mask = {id(p) for p in model.projectors.parameters()}, {id(model.fuse.mask_token)}
    for align, dropping, expected in (
        (True, True, set()), (False, True, projector), (True, False, mask), (False, False, projector | mask)
    ):  # fmt: skip
        x, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.zeros(2, dtype=torch.int64)
        out = model(x, t, labels, torch.arange(8).expand(2, 8) if dropping else None, align=align)
        (out.velocity.square().sum() + sum(z.sum() for z in out.aligned)).backward()
        without = {id(p) for p in model.parameters() if p.grad is None}
        assert without == {id(p) for p in idle_parameters(model, align, dropping)} == expected
        model.zero_grad()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", KINDS)
def test_graphs_on_a_gpu(changes, dtype, seed, caplog):
    *expected, _ = train("cuda", seed, *changes, dtype=dtype, graphs=False)
    *found, step = train("cuda", seed, *changes, dtype=dtype)
    assert "cannot be captured" not in caplog.text and step.graphs.captured is not None
    assert_same(found, expected, 1e-3 if dtype == torch.float32 else 5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip, reason="no NVIDIA GPU here")
@pytest.mark.parametrize("plan", ["none", "ddp", "fsdp"])
def test_captured_runs_over_nccl_are_the_plain_ones(plan, run, tmp_path, caplog):
    """One rank; collectives are launched all the same. 200 steps, a change of K, previews and checkpoints between."""
    own = {**LONG, **PLANS[plan], "training__max_steps": 200, "training__device": "cuda", "training__sample_every": 70}
    run("plain", **own, training__cuda_graph="false")
    run("captured", **own, training__cuda_graph="true")
    assert "cannot be captured" not in caplog.text
    assert_rows(tmp_path / "plain", tmp_path / "captured", plan, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("changes", [[], PAPER])
def test_a_step_on_a_gpu_does_not_synchronize(changes, seed, monkeypatch):
    own = TrainStep.gradients, TrainStep.update

    def watched(function):
        def call(*args):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return call

    train("cuda", seed, *changes, graphs=False)  # compiles and tunes
    monkeypatch.setattr(TrainStep, "gradients", watched(own[0]))
    monkeypatch.setattr(TrainStep, "update", watched(own[1]))
    train("cuda", seed, *changes, graphs=False)
