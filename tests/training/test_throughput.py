"""Throughput figures against torch's own counter and simple arithmetic."""

import itertools
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from maskalign.checkpoints import load_model
from maskalign.models import SiT
from maskalign.models.flops import step_flops
from maskalign.training import throughput
from maskalign.training.logs import read_metrics


@pytest.mark.parametrize("align", [True, False])
@pytest.mark.parametrize("kept", [8, 16])
def test_flops_are_those_that_torch_counts(kept, align):
    model = SiT(
        input_size=8, patch_size=2, width=64, depth=3, heads=2, teacher_dims=[32], align_depth=2, projector_dim=48,
        num_classes=3, mixer="attention", attention="math",
    )  # fmt: skip
    subset = torch.arange(kept).unsqueeze(0) if kept < 16 else None
    with FlopCounterMode(display=False) as counter:
        out = model(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([1]), subset, align=align)
        (out.velocity.sum() + sum(z.sum() for z in out.aligned)).backward()
    # The first product of a model has no gradient to its input.
    assert step_flops(model, kept, align) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_rows_count_the_tokens_that_are_computed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(throughput, "device_peak", lambda device, dtype: 1e12)
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: 0.25 * next(clock))  # seconds between two looks at the clock
    for name, keep in (("half", 0.5), ("all", 1.0)):
        run(name, method__keep_ratio=keep, method__keep_multiple=1)
    rows = [read_metrics(tmp_path / name / "metrics.csv")[-2:] for name in ("half", "all")]
    half, whole = (last for _, last in rows)
    per_image = [row["tflops"] / row["images_per_second"] for row in (half, whole)]
    model = load_model(tmp_path / "all")
    assert per_image == pytest.approx([step_flops(model, kept, align=True) / 1e12 for kept in (8, 16)], rel=1e-4)
    for before, row in rows:
        assert row["images_per_second"] == pytest.approx(8 / (row["time"] - before["time"]), rel=1e-4)
        assert row["mfu"] == pytest.approx(row["tflops"]) and row["comm_seconds"] == 0


def test_the_time_in_collectives_counts_overlaps_once():
    assert throughput._union([(5, 7), (0, 3), (1, 2), (2, 4)]) == 6
    assert throughput._union([]) == 0
    for name, yes in (("gloo:all_reduce", True), ("ncclDevKernel_AllGather_RING", True), ("aten::mm", False)):
        assert throughput._collective(name) == yes


def test_a_cpus_peak_is_that_of_the_fastest_of_a_few_products(monkeypatch):
    looks = iter([0.0, 5.0, 5.0, 5.5, 6.0, 9.0, 9.0, 9.75, 10.0, 12.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(looks))
    peak = throughput.device_peak(torch.device("cpu"), torch.float32)
    assert peak == pytest.approx(2 * 512**3 / 0.5) and next(looks, None) is None
