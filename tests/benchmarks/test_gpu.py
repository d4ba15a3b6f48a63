"""`python -m benchmarks.gpu` without a GPU: how it divides the time, what it reads off a trace, what the tables say."""

import csv
import json
import sys
import time

import pytest

from benchmarks.gpu import command, profile, report, schedule
from benchmarks.gpu.rows import Rows
from benchmarks.gpu.schedule import Part
from maskalign.errors import UsageError


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Pretended:
    """A clock, and processes that take given seconds: name -> (seconds, status, rows that they write)."""

    def __init__(self, folder, takes):
        self.folder, self.takes, self.time, self.given = folder, takes, 100.0, {}

    def now(self):
        return self.time

    def run(self, words, seconds):
        name = words[1]
        takes, status, rows = self.takes[name]
        self.given[name] = seconds
        table = Rows(self.folder / f"{name}.csv", ["value"])
        for value in range(rows):
            table.add(value=value)
        self.time += min(takes, seconds)
        if takes > seconds:
            return None, ""
        return status, f"the last line of {name}"


@pytest.fixture
def run(tmp_path):
    """run(parts as (name, share, least), takes, seconds) -> (outcomes by name, pretended, rows of gpu-parts.csv)."""

    def call(parts, takes, seconds):
        pretended = Pretended(tmp_path, takes)
        parts = [Part(name, ["python", name], f"{name}.csv", share, least) for name, share, least in parts]
        found = schedule.run_parts(parts, seconds, tmp_path, pretended.run, pretended.now, rehearsal=1)
        return {row["part"]: row for row in found}, pretended, read(tmp_path / "gpu-parts.csv")

    return call


def test_what_a_part_leaves_over_goes_to_those_after_it(run):
    takes = {"a": (10, 0, 2), "b": (20, 0, 1), "c": (5, 0, 0)}
    found, pretended, rows = run([("a", 1, 0), ("b", 1, 0), ("c", 2, 0)], takes, 120)
    # a: 120 * 1/4. b: a third of the 110 that are left. c: all of the 90 that are left then.
    assert pretended.given == pytest.approx({"a": 30, "b": 110 / 3, "c": 90})
    assert [row["status"] for row in found.values()] == ["done"] * 3
    assert [(row["part"], row["seconds"], row["rows"], row["rehearsal"]) for row in rows] == [
        ("a", "10", "2", "1"), ("b", "20", "1", "1"), ("c", "5", "0", "1"),
    ]  # fmt: skip


def test_what_fails_or_is_stopped_loses_nothing_of_the_others(run):
    takes = {"a": (1, 3, 4), "b": (1e9, 0, 5), "c": (1, 0, 6)}
    found, pretended, rows = run([("a", 1, 0), ("b", 1, 0), ("c", 1, 0)], takes, 90)
    assert [row["status"] for row in rows] == ["failed", "stopped", "done"]
    assert [row["rows"] for row in rows] == ["4", "5", "6"], "what they had written before stays"
    assert found["a"]["note"] == "the last line of a" and found["b"]["note"] == "out of time"
    assert found["b"]["seconds"] == pytest.approx(44.5)


def test_what_does_not_fit_is_named(run):
    takes = {"a": (1e9, 0, 0), "b": (1, 0, 0), "c": (1, 0, 1)}
    found, pretended, rows = run([("a", 8, 0), ("b", 1, 30), ("c", 1, 5)], takes, 100)
    assert [row["status"] for row in rows] == ["stopped", "did not fit", "done"]
    assert found["b"]["note"] == "needs 30 s, 10 s were left for it" and "b" not in pretended.given


def test_a_command_that_is_not_there_is_a_failed_part(tmp_path):
    parts = [Part("a", ["/no/such/program"], "a.csv"), Part("b", [sys.executable, "-c", "print('fine')"], "b.csv")]
    found = schedule.run_parts(parts, 60, tmp_path)
    assert [row["status"] for row in found] == ["failed", "done"] and "/no/such/program" in found[0]["note"]


def test_files_of_an_earlier_run_are_not_taken_for_this_one(tmp_path):
    Rows(tmp_path / "a.csv", ["value"]).add(value=1)
    found = schedule.run_parts([Part("a", [sys.executable, "-c", "raise SystemExit(2)"], "a.csv")], 60, tmp_path)
    assert found[0]["rows"] == 0 and not (tmp_path / "a.csv").exists()


def test_a_process_is_stopped_with_what_it_started(capfd, tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert schedule.run_process([sys.executable, "-c", code], 1.5) == (None, "begun")
    time.sleep(max(0.0, 5 - (time.monotonic() - start)))
    assert not mark.exists()
    status, line = schedule.run_process([sys.executable, "-c", "import sys; sys.exit('a reason')"], 60)
    assert (status, line) == (1, "a reason")


def test_the_parts_and_their_order(tmp_path):
    checkout = tmp_path / "models"
    checkout.mkdir()
    (checkout / "sit.py").touch()
    words = ["--device", "cpu", "--rehearse", "--out", str(tmp_path / "out"), "--reference", str(tmp_path)]
    parts = command.parts_of(command.parse(words))
    names = [part.name for part in parts]
    assert names == [
        "tests", "kernels", "steps b2", "steps xl2", "steps ddp", "steps fsdp", "steps reference", "profile",
    ]  # fmt: skip
    assert len({part.file for part in parts}) == len(parts)
    assert {part.file for part in parts} <= {f"gpu-{name}.csv" for name in report.FILES}
    assert all("--rehearse" in part.words for part in parts)
    without = [part.name for part in command.parts_of(command.parse(words[:-2]))]
    assert without == [name for name in names if name != "steps reference"]


def test_real_sizes(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    parts = {part.name: part.words for part in command.parts_of(command.parse([]))}
    for name, preset, batch in (("steps b2", "SiT-B/2", "128"), ("steps xl2", "SiT-XL/2", "64")):
        words = parts[name]
        assert words[words.index("--preset") + 1] == preset and words[words.index("--batch-size") + 1] == batch
        cases = words[words.index("--cases") + 1].split(",")
        assert set(cases) == {"repa", "reg", "maskalign", "maskalign-fast@0.5", "sit", "maskalign-fused"}
    assert all("--rehearse" not in words for words in parts.values())
    assert parts["profile"][parts["profile"].index("--cases") + 1] == "maskalign,repa"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "cpu"], "--device cpu needs --rehearse"),
        (["--device", "cpu", "--rehearse", "--minutes", "0"], "--minutes: 0 is not above 0"),
        (["--device", "cpu", "--rehearse", "--out", str(command.RESULTS / "deep")], "where results are kept"),
        (["--device", "cpu", "--rehearse", "--reference", "/nowhere"], "/nowhere has no models/sit.py"),
        ([], "no CUDA or ROCm device here; --device cpu --rehearse"),
    ],
)
def test_wrong_options(words, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        command.parse(words)


def event(category, name, start, length, number=None, dims=None, types=None, thread=1):
    args = {} if number is None else {"External id": number}
    args |= {} if dims is None else {"Input Dims": dims, "Input type": types}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": thread, "args": args}


BF16 = "c10::BFloat16"
EVENTS = [
    event("cpu_op", "aten::linear", 0, 50, 1, [[64, 32], [16, 32]], [BF16, BF16]),
    event("cpu_op", "aten::mm", 5, 30, 2, [[64, 32], [32, 16]], [BF16, BF16]),
    event("cpu_op", "triton_poi_fused_add_0", 60, 5, 3, [[64, 16], [64, 16], [64, 16]], [BF16, BF16, "float"]),
    event("cpu_op", "aten::_fused_adamw_", 70, 9, 4, [[[4, 4], [8]], [[4, 4], [8]]], ["TensorList", "TensorList"]),
    {"ph": "i", "cat": "cpu_op", "name": "an instant", "ts": 0},
    {"ph": "X", "cat": "python_function", "name": "no shapes", "ts": 0, "dur": 1},
]
KERNELS = [
    event("kernel", "gemm", 10, 40, 2), event("kernel", "split_k_reduce", 50, 10, 2), event("kernel", "add", 70, 20, 3),
    event("kernel", "gemm", 90, 60, 2), event("gpu_memset", "Memset", 150, 1), event("kernel", "adamw", 160, 8, 4),
]  # fmt: skip


def test_flops_and_bytes_come_from_the_shapes():
    launches = profile.launches_of({"traceEvents": EVENTS + KERNELS})
    by_name = {}
    for launch in launches:
        by_name.setdefault(launch.name, []).append(launch)
    # Two kernels of one product: the longest one is credited with it, once.
    credited = [launch for launch in by_name["gemm"] if launch.flops is not None]
    assert [(launch.us, launch.flops, launch.moved) for launch in credited] == [
        (60, 2 * 64 * 32 * 16, 2 * (64 * 32 + 32 * 16 + 64 * 16))
    ]
    assert by_name["split_k_reduce"][0].flops is None and by_name["split_k_reduce"][0].moved is None
    assert by_name["add"][0].moved == 64 * 16 * (2 + 2 + 4), "a compiled kernel is given its output, too"
    assert by_name["adamw"][0].flops is None and by_name["adamw"][0].moved >= 2 * 4 * (16 + 8)
    assert sum(launch.us for launch in launches) == 40 + 10 + 20 + 60 + 1 + 8


def test_a_kernel_is_held_to_the_ceiling_that_it_is_closer_to():
    launches = [
        profile.Launch("gemm", 100.0, 5e9, 1e6), profile.Launch("gemm", 100.0, 5e9, 1e6),
        profile.Launch("add", 50.0, None, 4e6), profile.Launch("unknown", 10.0, None, None),
    ]  # fmt: skip
    rows = {row["kernel"]: row for row in profile.rows_of(launches, 2, 1e14, 1e11)}
    assert list(rows) == ["gemm", "add", "unknown"], "in the order of their time"
    gemm, add, unknown = rows.values()
    assert (gemm["launches"], gemm["us"]) == (1, 100) and gemm["share"] == pytest.approx(200 / 260)
    assert gemm["tflops"] == pytest.approx(50) and gemm["gb_per_s"] == pytest.approx(10)
    assert (gemm["ceiling"], gemm["share_of_ceiling"]) == ("matmul", pytest.approx(0.5))
    assert (add["ceiling"], add["share_of_ceiling"]) == ("copy", pytest.approx(0.8))
    assert unknown["ceiling"] is None and unknown["kernels_us"] == pytest.approx(130)


def test_fifteen_kernels_are_kept():
    launches = [profile.Launch(f"kernel{n}", 100.0 - n, None, None) for n in range(40)]
    assert [row["kernel"] for row in profile.rows_of(launches, 1, 1, 1)] == [f"kernel{n}" for n in range(15)]


def test_on_a_cpu_an_operation_has_the_time_that_is_its_own():
    launches = {launch.name: launch for launch in profile.launches_of({"traceEvents": EVENTS})}
    assert launches["aten::linear"].us == 20 and launches["aten::mm"].us == 30
    other = [event("cpu_op", "aten::mm", 5, 30, 9, [[1, 1], [1, 1]], [BF16, BF16], thread=2)]
    again = {launch.name: launch.us for launch in profile.launches_of({"traceEvents": EVENTS + other})}
    assert again["aten::linear"] == 20, "another thread's operation is not inside"


def test_attention_is_counted_by_torchs_formula():
    shape = [2, 3, 8, 4]  # images, heads, tokens, width of a head
    operation = event("cpu_op", "aten::_scaled_dot_product_flash_attention", 0, 1, 1, [shape] * 3, [BF16] * 3)
    assert profile.flops_of(operation) == 2 * 2 * (2 * 3 * 8 * 8 * 4)


def write(folder, name, *rows):
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Rows(folder / f"gpu-{name}.csv", columns)
    for row in rows:
        table.add(**row)


STEP = {
    "preset": "SiT-B/2", "batch_size": 128, "plan": "none", "graph": 1, "step_ms": 40.0, "step_ms_low": 39.5,
    "step_ms_high": 41.0, "share_of_matmul_peak": 0.5, "peak_mib": 20480.0, "rehearsal": 0, "machine": "H200; torch 3",
}  # fmt: skip


def test_without_a_measurement_the_report_says_so(tmp_path):
    text = report.section(tmp_path)
    assert text.startswith("Not measured on a GPU:") and text.count(report.MISSING) == len(report.GOALS)
    assert "| 3,200 | not measured on a GPU |" in text


def test_goals_stand_beside_the_figures(tmp_path):
    repa, ours = ({"case": c, "images_per_second": v, **STEP} for c, v in (("repa", 3000.0), ("maskalign", 3600.0)))
    write(tmp_path, "steps-b2", repa, ours, {"case": "reg", "error": "OutOfMemoryError: no", **STEP})
    kernel = {"operation": "mix_and_drop", "shape": "B32", "direction": "forward", "ms": 0.04, "of_same_copy": 0.75}
    write(
        tmp_path,
        "kernels",
        {**kernel, "provider": "kernel", "rehearsal": 0},
        {**kernel, "provider": "eager", "ms": 0.4},
    )
    part = {"seconds": 30.0, "seconds_given": 40.0, "rows": 3, "started": "2027-01-02 03:04", "rehearsal": 0}
    write(
        tmp_path, "parts", {"part": "kernels", "status": "done", "note": "", **part},
        {"part": "profile", "status": "did not fit", "note": "needs 30 s, 2 s were left for it", **part},
    )  # fmt: skip
    write(
        tmp_path,
        "tests",
        {"test": "a::b", "outcome": "failed", "message": "wrong"},
        {"test": "a::c", "outcome": "passed"},
    )
    text = report.section(tmp_path)
    assert "Measured 2027-01-02 03:04" in text and "H200; torch 3" in text
    assert "| 3,200 | 3,000 | no, 94% of it |" in text and "| 3,500 | 3,600 | yes |" in text
    assert (
        "share of a copy's speed | 0.80 | 0.75 | no, 94% of it |" in text
        and "| 6,000 | not measured on a GPU |" in text
    )
    assert "| profile | did not fit |" in text and "needs 30 s, 2 s were left for it" in text
    assert "1 failed, 1 passed" in text and "`a::b`: wrong" in text
    assert "MaskAlign | 128 | 3,600 | 1.20x |" in text and "failed: OutOfMemoryError: no" in text
    assert "| 40.0 us | 75% | - | 10.00x |" in text


def test_a_rehearsal_is_no_result(tmp_path):
    write(tmp_path, "steps-b2", {"case": "repa", "images_per_second": 1.0, **STEP, "rehearsal": 1})
    with pytest.raises(UsageError, match=r"gpu-steps-b2\.csv is the result of a rehearsal"):
        report.section(tmp_path)


@pytest.mark.slow
def test_rehearsal(tmp_path, capfd):
    """Every part, on the CPU; each writes its rows, and no table is made of them."""
    words = ["--device", "cpu", "--rehearse", "--minutes", "40", "--out", str(tmp_path)]
    status = command.main(words)
    outcomes = read(tmp_path / "gpu-parts.csv")
    assert status == 0, capfd.readouterr().out[-3000:]
    assert [row["status"] for row in outcomes] == ["done"] * 7, json.dumps(outcomes, indent=1)
    steps = read(tmp_path / "gpu-steps-b2.csv")
    assert [row["case"] for row in steps] == command.STEP_CASES.split(",") and not any(row["error"] for row in steps)
    assert {row["case"]: row["tokens"] for row in steps}["maskalign-fast@0.5"] == "8/16"
    for plan in ("ddp", "fsdp"):
        rows = read(tmp_path / f"gpu-steps-{plan}.csv")
        assert {row["plan"] for row in rows} == {plan} and not any(row["error"] for row in rows)
        # One rank computes what no plan computes: the same seed, the same batch, the same step.
        alone = {row["case"]: float(row["loss"]) for row in steps}
        assert all(float(row["loss"]) == pytest.approx(alone[row["case"]], rel=2e-3) for row in rows)
    profiled = read(tmp_path / "gpu-profile.csv")
    assert {row["case"] for row in profiled} == {"maskalign", "repa"} and len(profiled) == 30
    assert any(row["kernel"] == "aten::mm" and float(row["tflops"]) > 0 for row in profiled)
    kernels = read(tmp_path / "gpu-kernels.csv")
    assert {row["operation"] for row in kernels} == {
        "mix_and_drop", "gated_residual_adaln", "adaln_modulate", "gated_residual", "subset_cosine_alignment",
    } and all(row["ms"] for row in kernels)  # fmt: skip
    with pytest.raises(UsageError, match="is the result of a rehearsal"):
        report.section(tmp_path)
