"""Planned memory against what a real step keeps, against steps traced at other sizes, and against exact sums."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.steps.clock import saved_bytes
from maskalign.checkpoints.build import build_model
from maskalign.planning.communication import step_collectives
from maskalign.planning.memory import Memory, shard_bytes
from maskalign.planning.trace import trace_step
from maskalign.planning.work import Phase, schedule_phases
from maskalign.runtime.ranks import Placement
from maskalign.training.compiling import prepare_blocks
from maskalign.training.optimizer import Optimizer
from maskalign.training.step import TrainStep

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HALF, ALL = Phase(32, 32, 1.0), Phase(64, 64, 1.0)


def meta_model(config, spec):
    with torch.device("meta"):
        return build_model(config, spec)


class Measured:
    """A real step with the trainer's own parts, as `benchmarks.steps.saved_bytes` counts it."""

    def __init__(self, config, spec, images, dtype):
        torch.manual_seed(0)
        self.model = build_model(config, spec)
        self.optimizer = Optimizer(self.model, config.optimizer, dtype)
        prepare_blocks(self.model, config)
        placement, latent = Placement(torch.device("cpu"), dtype), {"scale": 1.0, "bias": 0.0}
        self.train_step = TrainStep(self.model, self.optimizer, config, placement, latent=latent)
        size = spec.input_size
        rows = self.model.num_tokens + (self.model.class_dim is not None)
        self.batch = SimpleNamespace(
            inputs=torch.rand(images, 8, size, size),
            labels=torch.randint(10, (images,)),
            teachers=[torch.randint(-127, 127, (images, rows, 48), dtype=torch.int8)],
            class_token=torch.randn(images, self.model.class_dim) if self.model.class_dim else None,
        )

    def batches(self):
        return self.batch

    def weights(self):
        return [*self.model.parameters(), *self.model.buffers()]

    def step(self, batch):
        self.train_step(
            0, 0.0, batch.inputs, batch.labels, batch.teachers, class_token=batch.class_token,
        )  # fmt: skip


SMALL = {
    "repa, plain attention": ("fp32", "--model.mixer none --method.keep_ratio 1 --model.attention math"),
    "maskalign, fused attention, bf16": ("bf16", "--method.keep_ratio 0.5 --model.attention sdpa"),
    "maskalign of the paper, bf16": ("bf16", "--model.class_token true --model.attention sdpa"),
    "reg, plain attention": (
        "fp32", "--model.class_token true --model.mixer none --method.keep_ratio 1 --model.attention math",
    ),
    "tread, recomputed": (
        "fp32",
        "--model.mixer none --method.keep_ratio 0.5 --method.route [1,3] --method.restore bypass "
        "--model.attention sdpa --parallel.recompute selective --parallel.memory_budget 0.5",
    ),
    "loss only, depthwise mixer": (
        "fp32", "--model.mixer depthwise_conv --method.keep_ratio 0.5 --method.route none --model.attention math",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_activations_are_within_a_tenth_of_what_a_real_step_saves(settings, spec, name):
    precision, words = SMALL[name]
    config = settings(*words.split())
    spec = replace(spec, class_dim=24 if config.model.class_token else None)
    (phase,) = schedule_phases(config, meta_model(config, spec))
    plain = config.model.attention == "math"
    memory = Memory(config, spec, phase, dtype=DTYPES[precision], plain_attention=plain)
    measured = saved_bytes(Measured(config, spec, 8, DTYPES[precision]))
    assert memory.peak(8).kept == pytest.approx(measured, rel=0.1)
    assert memory.peak(8).activations >= 0.9 * measured


@pytest.mark.parametrize(
    "words",
    [
        "",
        pytest.param("--parallel.plan fsdp", marks=pytest.mark.slow),
        pytest.param("--training.accumulation 2 --parallel.recompute block", marks=pytest.mark.slow),
    ],
)
def test_a_larger_batch_is_what_a_trace_of_it_finds(settings, spec, words):
    config = settings(*words.split())
    memory = Memory(config, spec, HALF, shards=2)
    memory.low = trace_step(config, spec, HALF, 11, shards=2)  # the slope stays that of 2 and 3 images
    traced = memory.peak(11)
    memory.low = memory.high
    assert memory.peak(11) == traced and traced.kept > 0


def test_shards_scale_to_what_a_trace_on_other_ranks_finds(settings, spec):
    config = settings("--parallel.plan", "fsdp")
    model = meta_model(config, spec)
    few, many = (Memory(config, spec, ALL, shards=ranks) for ranks in (2, 8))
    there = many.peak(2, shard_bytes(model, 2) / shard_bytes(model, 8))
    here = few.peak(2)
    assert there.total == pytest.approx(here.total, rel=0.02)
    assert there.optimizer == pytest.approx(here.optimizer, rel=1e-9) and there.ema < many.peak(2, 8.0).ema


def test_state_is_that_of_float32_masters_moments_and_average(settings, spec):
    config = settings()
    count = sum(p.numel() for p in meta_model(config, spec).parameters())
    peak = Memory(config, spec, HALF, dtype=torch.bfloat16).peak(2)
    assert (peak.parameters, peak.optimizer, peak.ema) == (6 * count, 8 * count, 4 * count)
    whole = Memory(config, spec, HALF, dtype=torch.float32).peak(2)
    assert (whole.parameters, whole.optimizer, whole.ema) == (4 * count, 8 * count, 4 * count)
    config.parallel.ema_on_cpu = True
    assert Memory(config, spec, HALF, dtype=torch.float32).peak(2) == replace(whole, ema=0.0)


def test_ddp_holds_all_gradients_all_the_time(settings, spec):
    count = sum(p.numel() for p in meta_model(settings(), spec).parameters())
    alone = Memory(settings(), spec, ALL, dtype=torch.float32).peak(64)
    ddp = Memory(settings("--parallel.plan", "ddp"), spec, ALL, dtype=torch.float32).peak(64)
    assert ddp.gradients == 4 * count and ddp.total > alone.total


def test_recomputed_blocks_keep_less_and_fewer_tokens_too(settings, spec):
    keep = {}
    for kind in ("none", "selective", "block"):
        config = settings("--model.mixer", "token_mlp", "--parallel.recompute", kind)
        keep[kind] = Memory(config, spec, ALL).peak(16).kept
    assert keep["block"] < 0.6 * keep["selective"] < 0.6 * keep["none"]
    assert Memory(settings("--model.mixer", "token_mlp"), spec, HALF).peak(16).kept < 0.6 * keep["none"]


def test_the_largest_batch_is_the_last_that_fits(settings, spec):
    memory = Memory(settings(), spec, HALF)
    limit = memory.peak(40).total
    assert memory.largest(limit) == 40 and memory.largest(limit - 1) == 39
    assert memory.largest(memory.peak(1).total - 1) == 0


PLANS = {
    "fsdp": ("--parallel.plan fsdp", 4, 4),
    "ZeRO-2": ("--parallel.plan fsdp --parallel.reshard_after_forward false --training.accumulation 2", 4, 4),
    "accumulation": ("--parallel.plan fsdp --training.accumulation 2", 8, 8),
    "hsdp": ("--parallel.plan hsdp --parallel.shard_size 4", 8, 4),
}


@pytest.mark.parametrize("name", PLANS)
def test_collectives_are_those_that_fsdp_issues(settings, spec, name):
    words, ranks, shards = PLANS[name]
    config = settings(*words.split())
    trace = trace_step(config, spec, HALF, 2, shards=shards)
    found, planned = {}, {}
    for operation, members, size in trace.collectives:
        if size > 256:  # the loss and the norm
            kind = {"_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}.get(operation)
            key = kind or "all_reduce", members
            found[key] = found.get(key, 0) + size
    accumulation = config.training.accumulation
    for c in step_collectives(meta_model(config, spec), config.parallel, ranks, shards, accumulation):
        key = c.operation, c.ranks
        planned[key] = planned.get(key, 0) + c.times * c.size
    assert found == planned and found
