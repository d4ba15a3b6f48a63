"""Every kernel built for four targets without a GPU: no spill, no stack, 16-byte rows, few bytes."""

import csv
import subprocess
import sys

import pytest
import torch

from maskalign_kernels import runtime

pytestmark = pytest.mark.skipif(runtime.INTERPRET, reason="the kernels of this process are interpreted")
if not runtime.INTERPRET:
    from benchmarks import kernel_report
    from maskalign_kernels import aot, mix_and_drop_cases, subset_cosine_alignment_cases

    # For every run: the sizes of XL/2 in bfloat16, and the alignment of float32 with int8.
    ALIGNMENT = [subset_cosine_alignment_cases.SHAPES[i] for i in (0, 4)]
    MIX = mix_and_drop_cases.SHAPES[:1]
    TENSOR_CORES = {"sm_80": {"mma.sync"}, "sm_90": {"wgmma", "mma.sync"}, "sm_100": {"tcgen05", "mma.sync"}}
    TENSOR_CORES["gfx942"] = {"mfma"}


def judge(cases, target):
    rows = kernel_report.builds(cases, [target])
    assert rows
    bad = [(*list(row.values())[:6], kernel_report.faults(row)) for row in rows if kernel_report.faults(row)]
    assert not bad, "\n".join(map(str, bad))
    for row in rows:
        assert 0 < row["registers"] <= 256 * (2 if target == "gfx942" else 1) and 0 < row["occupancy"] <= 1
        assert row["widest_load"] >= 16, row
        if row["launch"] in ("mix", "hidden", "tokens"):
            assert row["tensor_core"] in TENSOR_CORES[target], row
        if row["operation"].startswith("subset_cosine_alignment") and row["launch"].endswith("rows"):
            assert row["narrowest_row_access"] == 16, row


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_default_builds(target):
    cases = list(subset_cosine_alignment_cases.aot_cases(ALIGNMENT, every_configuration=False))
    # The loss's kernels differ by a few scalars: one of them will do here.
    cases = [
        c
        for c in cases
        if not c.operation.endswith("loss") or (c.direction == "forward" and "bf16/bf16" in c.shape)
    ]
    judge([*cases, *mix_and_drop_cases.aot_cases(MIX, every_configuration=False)], target)


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("operation", ["subset_cosine_alignment", "mix_and_drop"])
def test_every_build(operation, target):
    judge(list(kernel_report.CASES[operation].aot_cases()), target)


def test_every_launch_moves_close_to_the_least_it_must():
    cases = [*subset_cosine_alignment_cases.aot_cases(), *mix_and_drop_cases.aot_cases()]
    over = {(c.operation, c.launch, c.shape, c.config): c.moved / c.least for c in cases}
    assert all(1 <= ratio <= 1.15 for ratio in over.values()), {k: v for k, v in over.items() if not 1 <= v <= 1.15}
    # The mixer leaves sums in parts, which its least does not contain: the rule has something to find.
    assert max(ratio for (operation, *_), ratio in over.items() if operation == "mix_and_drop") > 1.05


def test_bytes_reach_the_goals():
    rows = {
        (r["operation"], r["direction"], r["student"], r["shape"]): r for r in kernel_report.operations()
    }  # fmt: skip
    for (operation, direction, student, shape), row in rows.items():
        assert row["over_launch_least"] <= 1.15, row
        if operation.startswith("subset_cosine_alignment"):
            other = rows[operation, "backward" if direction == "forward" else "forward", student, shape]
            both = (row["bytes"] + other["bytes"]) / (row["unfused_bytes"] + other["unfused_bytes"])
            assert both <= 1 / 4, (row, both)
        elif direction == "forward":
            assert row["over_least"] <= 1.8, row
            if "KNone" not in shape:
                assert row["of_unfused"] <= 1 / 5, row
    assert {key[0] for key in rows} >= {
        "subset_cosine_alignment",
        "subset_cosine_alignment_loss",
        "mix_and_drop",
    }


def test_the_unfused_chain_is_counted_operation_by_operation():
    x = torch.empty(4, 8, device="meta", dtype=torch.float32)
    with kernel_report.BytesMoved() as count:
        y = x.t() * 2  # The view is free, the product reads and writes 32 floats.
        y.add_(torch.empty((), device="meta").expand(8, 4))  # Reads and writes 32, and one broadcast float.
    assert count.total == 4 * (32 + 32) + 4 * (2 * 32 + 1)


def test_faults_are_found():
    good = {"spills": 0, "stack": 0, "narrowest_row_access": 16, "over_least": 1.0}
    assert kernel_report.faults(good) == []
    for name, value in (("spills", 3), ("stack", 8), ("narrowest_row_access", 8), ("over_least", 1.2)):
        assert len(kernel_report.faults({**good, name: value})) == 1


def test_widths_of_an_unaligned_build_are_seen():
    """The check has teeth: rows of odd pitch cannot be read 16 bytes at a time, and the report says so."""
    import dataclasses

    case = next(iter(subset_cosine_alignment_cases.aot_cases(ALIGNMENT[:1], every_configuration=False)))
    odd = dataclasses.replace(
        case, arguments={**case.arguments, "student_row": 771, "student_batch": 771 * 128}
    )
    for target in ("sm_90", "gfx942"):
        assert aot.build(case, target).narrowest_row == 16
        narrow = aot.build(odd, target)
        assert narrow.narrowest_row == 2
        assert {size for name, _, size in narrow.access if name == "teacher_ptr"} == {16}


def test_spills_are_seen():
    """A launch in far too few threads has to spill."""
    import dataclasses

    case = next(iter(subset_cosine_alignment_cases.aot_cases(ALIGNMENT[:1], every_configuration=False)))
    case = dataclasses.replace(
        case, num_warps=1, waves=1, constexprs={**case.constexprs, "ROWS": 8, "BLOCK_C": 512}
    )
    build = aot.build(case, "sm_80")
    assert build.stack > 0 and build.spills > 0 and build.registers == 255


def test_occupancy_by_rule():
    assert aot.occupancy("sm_90", 128, 32, 0) == 1.0
    assert aot.occupancy("sm_90", 128, 128, 0) == 16 / 64  # 65536 / (128 * 32) warps.
    assert aot.occupancy("sm_80", 128, 32, 80 * 1024) == 8 / 64  # Two blocks of 81 KiB in 164.
    assert aot.occupancy("gfx942", 256, 128, 0) == 16 / 32  # 512 / 128 waves on each of four SIMDs.


@pytest.mark.sweep
def test_the_command_writes_both_tables(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernel_report", "--out", str(tmp_path), "--targets", "sm_90"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert "Not measured on a GPU" in run.stdout
    for name in ("builds.csv", "operations.csv"):
        with open(tmp_path / name) as file:
            assert len(list(csv.DictReader(file))) > 20
