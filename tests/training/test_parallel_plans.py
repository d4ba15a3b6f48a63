"""What the plans refuse, what they save, and what is compiled how often."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from maskalign.config import ParallelConfig, parse_config, shard_ranks, validate_with_ranks
from maskalign.errors import UsageError
from maskalign.models import SiT
from maskalign.models.initial import initialize
from maskalign.training import compiling
from maskalign.training.logs import read_metrics


@pytest.mark.parametrize(
    "changes, ranks, message",
    [
        (dict(), 2, "parallel.plan: none runs in one process, but torchrun started 2; set ddp, fsdp or hsdp"),
        (dict(parallel__plan="ddp"), 3, r"training.batch_size: 8 must be a multiple of .* 3 x 1 = 3"),
        (dict(parallel__plan="fsdp", training__accumulation=4), 4, r"training.batch_size: 8 must .* 4 x 4 = 16"),
        (dict(parallel__plan="hsdp", parallel__shard_size=3), 4, "parallel.shard_size: 3 must divide the 4 ranks"),
    ],
)
def test_settings_that_do_not_fit_the_ranks(command, changes, ranks, message):
    with pytest.raises(UsageError, match=message):
        validate_with_ranks(parse_config(command(**changes)), ranks)


def test_ranks_that_share_one_copy():
    for plan, size, expected in (
        ("ddp", None, 1), ("fsdp", None, 16), ("hsdp", None, 8), ("hsdp", 4, 4), ("none", None, 1)
    ):  # fmt: skip
        assert shard_ranks(ParallelConfig(plan=plan, shard_size=size), 16, 8) == expected


@pytest.mark.distributed
@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(), "maskalign: error: parallel.plan: none runs in one process"),
        (dict(parallel__plan="ddp", training__batch_size=7), "maskalign: error: training.batch_size: 7 must be"),
    ],
)
def test_a_users_mistake_is_one_line_for_all_ranks(command, changes, message):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*torchrun, "-m", "maskalign", "train", *command(**changes)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("maskalign:")]
    assert done.returncode != 0 and len(lines) == 1 and lines[0].startswith(message), done.stderr


def small(**changes):
    own = dict(input_size=8, width=16, depth=3, heads=2, num_classes=3, teacher_dims=[6], align_depth=2)
    return SiT(**{**own, "projector_dim": 8, "mixer_hidden": 4, **changes})


def test_initial_weights_depend_on_seed_and_name_alone(seed):
    with torch.device("meta"):
        model = small()
    model.to_empty(device="cpu").reset_parameters(seed)
    other = small(mixer="none", teacher_dims=[], depth=2)
    torch.manual_seed(seed + 1)
    initialize(other, seed)
    own = dict(model.named_parameters())
    for name, p in other.named_parameters():
        assert torch.equal(p, own[name]), name
    torch.testing.assert_close(model.pos_embed, small().pos_embed, rtol=0, atol=0)
    initialize(other, seed + 1)
    assert not torch.equal(other.blocks[0].attn.qkv.weight, own["blocks.0.attn.qkv.weight"])


def test_initial_weights_are_repas(seed):
    torch.manual_seed(seed)
    model = small(width=128, heads=4, restore="fuse", mixer="depthwise_conv", projector="conv", qk_norm=True)
    for name, p in model.named_parameters():
        flat = p.detach().flatten(1) if p.dim() > 1 else p.detach()
        if "adaLN" in name or name.startswith("final_layer"):
            assert not p.any(), name
        elif name in ("y_embedder.embedding_table.weight", "t_embedder.mlp.0.weight", "t_embedder.mlp.2.weight"):
            assert abs(float(flat.std()) / 0.02 - 1) < 0.15, name
        elif p.dim() > 1 and "conv" not in name:
            bound = (6 / sum(flat.shape)) ** 0.5
            assert 0.9 * bound < float(flat.abs().max()) <= bound, name
        elif name.endswith("norm.weight"):
            assert torch.equal(flat, torch.ones_like(flat)), name
        elif name.endswith(".bias") and "conv" not in name:
            assert not p.any(), name


def saved_bytes(model, subset):
    """Bytes that autograd keeps for the backward of one forward, each storage once, parameters left out."""
    kept, own = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(torch.randn(4, 4, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 0]), subset)
    loss = out.velocity.square().sum() + out.aligned[0].square().sum()
    loss.backward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_recomputation_keeps_less_and_changes_no_gradient(command, seed):
    sizes, gradients = {}, {}
    cases = {"none": dict(), "half": dict(recompute="selective", memory_budget=0.5), "block": dict(recompute="block")}
    for name, changes in cases.items():
        torch.manual_seed(seed)
        model = small(depth=8)
        torch.nn.init.normal_(model.final_layer.linear.weight)
        changes = {f"parallel__{key}": value for key, value in changes.items()}
        compiling.prepare_blocks(model, parse_config(command(**changes)))
        sizes[name] = saved_bytes(model, torch.arange(8).expand(4, 8))
        gradients[name] = [p.grad for p in model.parameters()]
    assert sizes["block"] < 0.4 * sizes["none"] and sizes["block"] < sizes["half"] < 0.8 * sizes["none"], sizes
    for name in ("half", "block"):
        for a, b in zip(gradients["none"], gradients[name], strict=True):
            assert (a is None and b is None) or torch.equal(a, b), name


@pytest.mark.slow
def test_compiled_blocks_keep_what_the_budget_allows(command, seed, monkeypatch):
    # The partitioner that inductor uses, without its slow code generation.
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager_decomp_partition")
    sizes, gradients = [], []
    for budget in (1.0, 0.5, 0.1):
        torch._dynamo.reset()
        torch.manual_seed(seed)
        model = small(depth=2, width=64, mixer="none")
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.05)
        changes = dict(parallel__recompute="selective", parallel__memory_budget=budget, training__compile="true")
        try:
            compiling.prepare_blocks(model, parse_config(command(**changes)))
            sizes.append(saved_bytes(model, torch.arange(8).expand(4, 8)))
        finally:
            torch._functorch.config.activation_memory_budget = 1.0
        gradients.append([p.grad for p in model.parameters()])
    assert sizes[2] < sizes[1] < sizes[0] and sizes[2] < 0.6 * sizes[0], sizes
    for other in gradients[1:]:
        for a, b in zip(gradients[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, expected", [(0, []), (2, [1, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3])])
def test_recomputed_blocks_are_spread(count, expected):
    assert compiling.spread(count, 4) == expected


@pytest.mark.parametrize("recompute", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_a_whole_run_with_a_schedule_compiles_each_part_once(run, tmp_path, monkeypatch, recompute):
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    run(
        training__compile="true",
        training__max_steps=8,
        training__sample_every=3,
        model__depth=3,
        parallel__recompute=recompute,
        method__keep_multiple=1,
        method__keep_ratio='{"kind": "linear", "start": 0.25, "end": 1.0, "until": 0.8}',
    )
    assert len({row["keep_ratio"] for row in read_metrics(tmp_path / "run" / "metrics.csv")}) >= 6
    # Three equal blocks are one graph, the mixer is the other; no block fell back to eager code.
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"] and not counters["unimplemented"]
