"""A step as a graph: what is recorded, what is copied to it, and when; on a GPU the real thing, elsewhere pretended."""

import contextlib

import pytest
import torch

from maskalign.checkpoints.build import build_model
from maskalign.config import parse_config
from maskalign.objective.draws import Draws
from maskalign.runtime.ranks import Placement
from maskalign.training import graphs
from maskalign.training.optimizer import Optimizer
from maskalign.training.step import MicroBatch, TrainStep

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
    sizes = {"input_size": 8, "in_channels": 3, "num_classes": 5, "teacher_dims": [6], "class_dim": class_dim}
    model = build_model(config, sizes)
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


def assert_same(found, expected, tolerance=1e-4):
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
    """torch.cuda as far as graphs.py uses it, and recordings that compute again instead of replaying."""

    class Stream:
        def __init__(self, device=None):
            """Everything runs in one order here."""

        def wait_stream(self, other):
            """What came before is done."""

    class Recording(graphs.Recording):
        count = 0

        def __init__(self, compute, arguments, stream):
            micro_batches, *numbers = arguments
            self.micro_batches = [micro_batch.map(torch.clone) for micro_batch in micro_batches]
            self.results = None
            self.graph = self
            self.again = lambda: compute(self.micro_batches, *numbers)
            Recording.count += 1

        def replay(self, micro_batches=None):
            if micro_batches is not None:
                return super().replay(micro_batches)
            self.results = self.again()

    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr("maskalign.training.step.can_record", lambda config, placement: config.training.cuda_graph)
    monkeypatch.setattr(graphs, "Recording", Recording)
    return Recording


@pytest.mark.parametrize("changes", KINDS)
def test_graphs_compute_what_steps_compute(changes, pretended, seed):
    *expected, _ = train("cpu", seed, *changes, graphs=False)
    *found, step = train("cpu", seed, *changes)
    assert_same(found, expected)
    skipped = expected[0][:, -1]
    assert skipped[4] == 1 and skipped.sum() == 1, "one step had a NaN"
    kinds = 2 if RISING[1] in changes or ENDING[1] in changes else 1
    assert pretended.count == kinds and all(seen == graphs.WARM_UP + 1 for seen in step.graphs.seen.values())


def test_one_graph_at_a_time_and_a_kind_that_returns_runs_kernel_by_kernel(pretended, monkeypatch):
    freed = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(1))
    ran = []

    def compute(micro_batches, align_weight, lr):
        ran.append(float(align_weight))
        return (micro_batches[0].x.sum() * align_weight + lr,)

    steps = graphs.StepGraphs(compute, torch.nn.Linear(1, 1), torch.device("cpu"))
    draws = Draws(*[None] * len(Draws._fields))
    batches = {n: [MicroBatch(torch.full((n,), 2.0), torch.zeros(n), [], draws, 1.0, True)] for n in (3, 5)}

    def step(n, weight=1.0):
        (result,) = steps(batches[n], weight, 0.5)
        assert float(result) == 2 * n * weight + 0.5

    for _ in range(graphs.WARM_UP + 2):
        step(3)
    assert steps.recording is not None and len(freed) == 1
    step(5)
    assert steps.recording is None and len(freed) == 2, "the memory is free for the first step of another kind"
    for _ in range(graphs.WARM_UP + 1):
        step(5)
    assert steps.recording is not None and pretended.count == 2
    for _ in range(graphs.WARM_UP + 3):
        step(3)
    assert steps.recording is None and pretended.count == 2
    step(5, weight=0.0)  # without alignment it is another kind
    assert ran[-1] == 0


def test_what_cannot_be_recorded_runs_kernel_by_kernel(pretended, seed, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "Recording", refuse)
    assert_same(train("cpu", seed)[:2], train("cpu", seed, graphs=False)[:2])
    assert caplog.text.count("cannot be recorded (operation not permitted when stream is capturing)") == 1


def test_who_records():
    config = parse_config(SETTINGS)
    gpu = Placement(torch.device("cuda"), torch.bfloat16)
    assert graphs.can_record(config, gpu)
    assert not graphs.can_record(config, Placement(torch.device("cpu"), torch.float32))
    assert not graphs.can_record(config, Placement(torch.device("cuda"), torch.bfloat16, mesh=object()))
    assert not graphs.can_record(parse_config([*SETTINGS, "--training.cuda_graph", "false"]), gpu)
    assert not graphs.can_record(parse_config([*SETTINGS, "--parallel.ema_on_cpu", "true"]), gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", KINDS)
def test_graphs_on_a_gpu(changes, dtype, seed, caplog):
    *expected, _ = train("cuda", seed, *changes, dtype=dtype, graphs=False)
    *found, step = train("cuda", seed, *changes, dtype=dtype)
    assert "cannot be recorded" not in caplog.text and step.graphs.recording is not None
    assert_same(found, expected, 1e-3 if dtype == torch.float32 else 5e-2)
