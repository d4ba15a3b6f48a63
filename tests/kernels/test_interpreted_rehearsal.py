"""What waits for a GPU, rehearsed on the CPU through the interpreter: the benchmark, and the tests marked `gpu`.

The times and the memory here are made up; that the code around them runs, and judges results as it should, is not.
"""

import contextlib
import csv
import importlib.util
import pathlib

import pytest
import torch
import triton

from benchmarks import kernel_report
from benchmarks.kernels import cases, command, configurations

F16, BF16, INT8 = torch.float16, torch.bfloat16, torch.int8
SHAPES = {
    "subset_cosine_alignment": [(2, 9, 4, 32, BF16, INT8)],
    "mix_and_drop": [(2, 12, 6, 32, 8, F16, F16, F16), (2, 12, None, 32, 8, BF16, torch.float32, BF16)],
    "adaln_modulate": [(2, 12, 6, 32, F16, F16)],
    "gated_residual": [(2, 12, None, 32, BF16, BF16)],
    "gated_residual_adaln": [(2, 12, 6, 32, torch.float32, BF16)],
}


@pytest.fixture
def pretend_gpu(monkeypatch):
    """torch.cuda as far as the benchmark and the tests use it, around tensors that stay on the CPU."""

    def do_bench(run, quantiles=None, return_mode="mean", **_):
        run()
        return [2.0, 1.0, 3.0] if quantiles else 4.0

    class Graph:
        def replay(self):
            """Nothing to replay: `do_bench` above makes its times up."""

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    for name, value in {
        "CUDAGraph": Graph,
        "Stream": lambda: None,
        "current_stream": lambda: None,
        "stream": lambda stream: contextlib.nullcontext(),
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3 << 20,
        "get_device_name": lambda: "pretended",
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(command.GPU, "copy_bandwidth", lambda device, moved=0: 1000.0)


def run_benchmark(folder):
    status = command.benchmark(list(SHAPES), SHAPES, torch.device("cpu"), folder)
    with open(folder / "kernels.csv") as file:
        return status, list(csv.DictReader(file))


def test_benchmark(pretend_gpu, tmp_path):
    status, rows = run_benchmark(tmp_path)
    assert status == 0
    assert len(rows) == 6 * 3 * 3, "six shapes, three providers, three directions"
    for row in rows:
        assert (row["ms"], row["call_ms"], row["peak_mib"]) == ("2.0", "4.0", "3.0")
        assert float(row["gb_per_s"]) == pytest.approx(float(row["bytes"]) / 2e6)
        assert 0 <= float(row["error"]) < 0.07
    assert (tmp_path / "kernels.png").stat().st_size > 1000


def test_every_configuration_is_timed(pretend_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(configurations, "copy_bandwidth", lambda device, moved=0: 1000.0)
    asked = []

    def graph_ms(run):
        asked.append(run)
        run()
        return [2.0, 1.0, 3.0]

    monkeypatch.setattr(configurations, "graph_ms", graph_ms)
    assert configurations.benchmark(list(SHAPES), SHAPES, torch.device("cpu"), tmp_path) == 0
    with open(tmp_path / "kernels-configurations.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(asked)
    assert {row["launch"] for row in rows} == {"forward", "backward", "statistics", "mix", "hidden", "tokens"}
    for launch in ("forward", "backward", "statistics", "mix", "tokens"):
        shapes = [(r["operation"], r["shape"]) for r in rows if r["launch"] == launch and r["default"] == "1"]
        assert len(shapes) == len(set(shapes)), "one default each"
    assert all(float(row["of_same_copy"]) == pytest.approx(float(row["bytes"]) / 2e6 / 1000) for row in rows)


def test_benchmark_times_no_wrong_result(pretend_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "mix_and_drop", lambda x, *rest: 1.1 * kernel_report.unfused_mix(x, *rest))
    status, rows = run_benchmark(tmp_path)
    assert status == 1
    wrong = [row for row in rows if row["ms"] == ""]
    assert {(row["operation"], row["provider"]) for row in wrong} == {("mix_and_drop", "kernel")}


@pytest.fixture
def gpu_tests(monkeypatch):
    path = pathlib.Path(__file__).with_name("test_gpu.py")
    spec = importlib.util.spec_from_file_location("gpu_tests", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", [(2, 7, 3, 33)])
    monkeypatch.setattr(module, "ADALN_SHAPES", [(2, 9, 4, 24), (1, 6, None, 20)])
    monkeypatch.setattr(module, "MIX_SHAPES", [(2, 9, 5, 24, 6), (1, 6, None, 16, 4)])
    return module


def test_gpu_tests_of_adaln(pretend_gpu, gpu_tests, adaln_case, adaln_truth, relative, generator, monkeypatch):
    for operation in kernel_report.UNFUSED_ADALN:
        for dtypes in ((BF16, BF16), (torch.float32, BF16)):
            gpu_tests.test_adaln(operation, *dtypes, adaln_case, adaln_truth, relative, generator, None)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    gpu_tests.test_adaln_runs_repeat_without_waiting(lambda *sizes: adaln_case(sizes[0], 2, 9, 24, 4, BF16))


def test_gpu_tests(pretend_gpu, gpu_tests, alignment_case, cosine_truth, relative, tolerance, generator, monkeypatch):
    gpu_tests.test_alignment(BF16, INT8, True, alignment_case, cosine_truth, relative, tolerance, None, generator)
    for dtype in (torch.float32, F16, BF16):
        gpu_tests.test_mix_and_drop(dtype, relative, generator, None)
    gpu_tests.test_opcheck(alignment_case, generator)
    gpu_tests.test_debug_mode_checks_the_indices(alignment_case, monkeypatch)
