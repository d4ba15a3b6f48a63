"""What a captured step runs asks the device for no value: a host synchronization cannot be captured, and costs time.

Tensors on the device "meta" have no values, so every question for one fails there. Plans of several ranks cannot run on
meta; there the operations are watched that read values.
"""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import parse_config
from maskalign.objective import alignment
from maskalign.runtime.ranks import leave_ranks
from maskalign.training import step as step_module
from maskalign.training.optimizer import Optimizer
from maskalign.training.parallel import make_placement
from maskalign.training.plans import Plan
from maskalign.training.step import MicroBatch, TrainStep

SETTINGS = [
    "--model.depth", "2", "--model.width", "16", "--model.heads", "2", "--model.patch_size", "2",
    "--model.projector_dim", "8", "--method.align_depth", "1", "--method.keep_multiple", "4", "--model.class_token",
    "true", "--optimizer.ema_warmup", "0.05",
]  # fmt: skip
SPEC = ModelSpec(input_size=8, in_channels=3, num_classes=5, teacher_dims=[6], class_dim=6)
RECIPES = {
    "maskalign": [],
    "reg": ["--model.mixer", "none", "--method.keep_ratio", "1"],
    "token mlp": ["--model.mixer", "token_mlp", "--method.keep_ratio", "0.5", "--method.align_ratio", "0.25"],
    "fuse": ["--model.mixer", "none", "--method.route", "[0, 1]", "--method.restore", "fuse"],
    "fused adaLN": ["--model.fused_adaln", "true"],
}
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim", "_unique2")


class NoReads(TorchDispatchMode):
    """Raises where an operation needs values on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if name in READS or "index" in name and _has_mask(args):
            raise AssertionError(f"host synchronization: {name}")
        return func(*args, **(kwargs or {}))


def _has_mask(args):
    """Indexing with a mask looks how many of its elements are set."""
    lists = [arg for arg in args if isinstance(arg, (list, tuple))]
    return any(isinstance(t, torch.Tensor) and t.dtype == torch.bool for entry in lists for t in entry)


def make(device, changes=(), dtype=torch.float32, plan="none"):
    """A `TrainStep`, its optimizer and a batch of two micro-batches on a device."""
    config = parse_config([*SETTINGS, *changes, "--parallel.plan", plan, "--training.device", "cpu"])
    config.training.precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    placement = make_placement(config.training, config.parallel)
    model = build_model(config, SPEC)
    spread = Plan(model, config, placement)
    model.to(device)
    step = TrainStep(model, Optimizer(model, config.optimizer, dtype), config, placement, spread)
    draws = step.draws(0, 0, 2, step.tokens.kept(0.0), step.tokens.drawn(0.0), posterior=False)
    object.__setattr__(placement, "device", torch.device(device))
    batch = MicroBatch(
        torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64), [torch.randn(2, 17, 6)], draws, 0.5, False,
        torch.randn(2, 6),
    ).map(lambda tensor: tensor.to(device))  # fmt: skip
    return step, [batch, batch._replace(last=True)]


def run(step, batches):
    """What StepGraphs captures, with the device's tensors for what changes."""
    weight, lr = (torch.full((), value, device=step.placement.device) for value in (0.5, 1e-3))
    losses = step.gradients(batches, weight)
    return step.update(losses, lr)


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """In every test here."""


@pytest.fixture(autouse=True)
def gpu_kernels(monkeypatch):
    """Stands in for what has kernels of its own on a GPU: our operators, whose CPU code looks at the indices that it is
    given, and torch's fused AdamW, which has none for meta."""

    def loss(student, teacher, subset):
        rows = teacher.float().gather(1, subset.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))
        return -torch.cosine_similarity(student.float(), rows, dim=-1).mean()

    monkeypatch.setattr(alignment, "subset_cosine_alignment_loss", loss)
    own = torch._fused_adamw_

    def adamw(params, *args, **kwargs):
        return None if params[0].is_meta else own(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adamw_", adamw)
    adam = importlib.import_module("torch.optim.adam")
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *args, **kwargs: None)


@pytest.mark.parametrize("recipe, dtype", [("maskalign", torch.bfloat16), *((name, torch.float32) for name in RECIPES)])
def test_a_step_needs_no_values(recipe, dtype):
    step, batches = make("meta", RECIPES[recipe], dtype)
    norm, skipped = run(step, batches)
    assert norm.is_meta and skipped.is_meta and norm.shape == skipped.shape == ()
    run(step, [batch._replace(teachers=[]) for batch in batches])


@pytest.mark.parametrize(
    "plan, dtype",
    [("none", torch.float32), ("ddp", torch.bfloat16), ("fsdp", torch.bfloat16), ("hsdp", torch.float32)],
)
def test_a_step_under_a_plan_reads_no_values(plan, dtype):
    try:
        step, batches = make("cpu", plan=plan, dtype=dtype)
        run(step, batches)
        with NoReads():
            _, skipped = run(step, batches)
        assert not skipped
    finally:
        leave_ranks()


SYNCHRONIZATIONS = {
    "item": lambda loss: loss.item(),
    "bool": lambda loss: bool(loss > 0),
    "cpu": lambda loss: loss.detach().cpu(),
    "nonzero": lambda loss: loss.reshape(1).nonzero(),
    "mask": lambda loss: loss.reshape(1)[loss.reshape(1) > 0],
    "numpy": lambda loss: loss.detach().numpy(),
}


@pytest.mark.parametrize("way", SYNCHRONIZATIONS)
def test_one_that_is_added_is_found(way, monkeypatch):
    own = step_module.training_loss

    def reading(*args, **kwargs):
        losses = own(*args, **kwargs)
        SYNCHRONIZATIONS[way](losses.total)
        return losses

    monkeypatch.setattr(step_module, "training_loss", reading)
    step, batches = make("meta")
    with pytest.raises((RuntimeError, NotImplementedError, TypeError), match="(?i)meta"):
        run(step, batches)
    if way not in ("cpu", "numpy"):  # on a CPU these two do nothing
        step, batches = make("cpu")
        with pytest.raises(AssertionError, match="host synchronization"), NoReads():
            run(step, batches)
