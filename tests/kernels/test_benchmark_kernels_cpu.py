"""`python -m benchmarks.kernels --device cpu`: what it writes, what it refuses to time, and how it forms its ratios."""

import csv
import shutil

import pytest
import torch

from benchmarks.kernels import cases, command, cpu

F32, BF16, INT8 = torch.float32, torch.bfloat16, torch.int8
SHAPES = {
    "subset_cosine_alignment": [(2, 9, 4, 32, BF16, INT8)],
    "mix_and_drop": [(2, 12, 6, 32, 8, F32, F32, F32)],
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(*words) -> exit status and the rows of the CSV, on tiny shapes; compiling is pretended."""
    monkeypatch.setattr(cpu, "SHAPES", SHAPES)
    monkeypatch.setattr(cpu, "matmul_peak", lambda *_: 1e9)
    monkeypatch.setattr(cpu, "tune_host", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function: function)

    def call(*words):
        status = command.main(["--device", "cpu", "--rounds", "3", "--out", str(tmp_path), *words])
        with open(tmp_path / "kernels-cpu.csv", newline="") as file:
            return status, list(csv.DictReader(file))

    return call


def test_rows_table_and_plot(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cpu, "can_compile", lambda device: True)
    status, rows = run("--threads", "1", "--clock", "cpu")
    assert status == 0
    expected = {(o, p, d) for o in SHAPES for p in cases.PROVIDERS for d in cases.DIRECTIONS}
    assert len(rows) == len(expected) and {(r["operation"], r["provider"], r["direction"]) for r in rows} == expected
    for row in rows:
        assert 0 < float(row["ms_20"]) <= float(row["ms"]) <= float(row["ms_80"])
        assert (row["rounds"], row["clock"]) == ("3", "cpu") and "torch" in row["machine"]
        assert 0 <= float(row["error"]) < 0.07
        if row["provider"] == "kernel":
            assert row["x_kernel"] == row["x_kernel_20"] == row["x_kernel_80"] == "1"
    assert (tmp_path / "kernels-cpu.png").stat().st_size > 1000
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(tuple(SHAPES)) for line in printed) == len(rows)


def test_a_wrong_result_is_not_timed(run, monkeypatch):
    def wrong(x, *rest):
        return 1.2 * cases.kernel_report.unfused_mix(x, *rest)

    monkeypatch.setattr(cases, "mix_and_drop", wrong)
    status, rows = run()
    assert status == 1
    untimed = [row for row in rows if row["ms"] == ""]
    assert [(row["operation"], row["provider"]) for row in untimed] == [("mix_and_drop", "kernel")]
    others = [row for row in rows if row["operation"] == "mix_and_drop" and row["ms"]]
    assert others and all(row["x_kernel"] == "" for row in others), "there is no time of ours to compare with"


def test_a_wrong_gradient_is_not_timed(run, monkeypatch):
    """A lost gradient leaves the result as it is: the check looks at both."""

    def lost(student, *rest):
        return cases.kernel_report.unfused_alignment(student * 0 + student.detach(), *rest)

    monkeypatch.setattr(cases, "subset_cosine_alignment", lost)
    status, rows = run("--operations", "subset_cosine_alignment")
    assert status == 1 and [row["provider"] for row in rows if row["ms"] == ""] == ["kernel"]


def test_without_a_compiler_the_rest_is_measured(run, monkeypatch, capsys):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    status, rows = run("--operations", "mix_and_drop")
    assert status == 0 and {row["provider"] for row in rows} == {"kernel", "eager"}
    assert "no C++ compiler" in capsys.readouterr().out


def test_threads_are_set(run):
    before = torch.get_num_threads()
    try:
        _, rows = run("--operations", "mix_and_drop", "--threads", "2")
        assert torch.get_num_threads() == 2 and "2 threads" in rows[0]["machine"]
    finally:
        torch.set_num_threads(before)


def test_figures_are_medians_and_ratios_are_taken_within_a_round():
    """The machine slows down threefold in the second round: the ratio does not feel it."""
    seconds = {"kernel": {"both": [0.010, 0.030, 0.011]}, "eager": {"both": [0.020, 0.060, 0.033]}}
    of = {row["provider"]: row for row in cpu.rows_of(seconds)}
    assert of["kernel"]["ms"] == pytest.approx(11) and of["kernel"]["x_kernel"] == 1
    assert (of["eager"]["ms"], of["eager"]["x_kernel"]) == (pytest.approx(33), pytest.approx(2))
    assert (of["eager"]["ms_20"], of["eager"]["ms_80"]) == (pytest.approx(20), pytest.approx(60))
    assert (of["eager"]["x_kernel_20"], of["eager"]["x_kernel_80"]) == (pytest.approx(2), pytest.approx(3))


def test_providers_take_turns_within_a_round():
    calls = []

    def provider(name):
        def function(x):
            calls.append(name)
            return x * 2

        return function

    x = torch.ones(3, requires_grad=True)
    names = ("kernel", "eager", "compiled")
    found = cpu.take_turns({name: provider(name) for name in names}, (x,), [x], 6, "wall")
    rounds = [tuple(calls[1 + 3 * n : 4 + 3 * n]) for n in range(cpu.WARMUP + 6)]  # the first call: a shape
    assert all(sorted(turn) == sorted(names) for turn in rounds) and len(set(rounds)) > 1
    for of in found.values():
        assert len(of["both"]) == 6
        assert of["both"] == pytest.approx([f + b for f, b in zip(of["forward"], of["backward"], strict=True)])


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device", "cpu", "--threads", "2"], ["--threads", "1"]])
def test_the_processors_clock_goes_with_one_thread(words, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*words, "--clock", "cpu"])
    assert stop.value.code == 2 and "--threads 1" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_failure(capsys):
    assert command.main(["--device", "cuda"]) == 1
    assert "no CUDA or ROCm device" in capsys.readouterr().out


def test_every_shape_is_one_that_cpus_train():
    """Preset widths, batch 8 and the two keep ratios; the label that the tables show names each one once."""
    labels = [cases.label(operation, shape) for operation, of in cpu.SHAPES.items() for shape in of]
    assert len(set(labels)) == len(labels)
    assert {shape[3] for shape in cpu.SHAPES["mix_and_drop"]} == {384, 768}
    assert {shape[2] for of in cpu.SHAPES.values() for shape in of} == {128, 64}
