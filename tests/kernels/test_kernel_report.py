"""Every kernel built for four targets without a GPU: no spill, no stack, 16-byte rows, few bytes."""

import collections
import csv
import subprocess
import sys

import pytest
import torch

from maskalign_kernels import runtime

pytestmark = pytest.mark.skipif(runtime.INTERPRET, reason="the kernels of this process are interpreted")
if not runtime.INTERPRET:
    from benchmarks import kernel_report
    from maskalign_kernels import aot
    from maskalign_kernels.adaln import cases as adaln_cases
    from maskalign_kernels.mix_and_drop import cases as mix_cases
    from maskalign_kernels.subset_cosine_alignment import cases as alignment_cases

    # For every run: the sizes of XL/2 in bfloat16 (the last mixing layer's), and the alignment of float32 with int8.
    ALIGNMENT = [alignment_cases.SHAPES[i] for i in (0, 4)]
    MIX = mix_cases.SHAPES[:1]
    ADALN = adaln_cases.SHAPES[1:2]
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
        if row["launch"] in ("forward", "backward"):
            assert row["narrowest_row_access"] == 16, row


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_default_builds(target):
    cases = list(alignment_cases.aot_cases(ALIGNMENT, every_configuration=False))
    # The loss's kernels differ by a few scalars: one of them will do here.
    cases = [
        c for c in cases if not c.operation.endswith("loss") or (c.direction == "forward" and "bf16/bf16" in c.shape)
    ]
    adaln = [case for operation in adaln_cases.OPERATIONS.values() for case in operation.aot_cases(ADALN, False)]
    judge([*cases, *mix_cases.aot_cases(MIX, every_configuration=False), *adaln], target)


def every_shape():
    """(operation, number of the shape), for parts of the sweep that can be run alone."""
    return [(operation, i) for operation, module in kernel_report.CASES.items() for i in range(len(module.SHAPES))]


@pytest.mark.sweep
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("operation, shape", [] if runtime.INTERPRET else every_shape())
def test_every_build(operation, shape, target):
    module = kernel_report.CASES[operation]
    judge(list(module.aot_cases([module.SHAPES[shape]])), target)


def test_every_launch_moves_close_to_the_least_it_must():
    """By the report's own counts. The tests in Triton's interpreter hold these to the addresses that programs touch."""
    cases = [case for module in kernel_report.CASES.values() for case in module.aot_cases()]
    over = {(c.operation, c.launch, c.shape, c.config): c.moved / c.least for c in cases}
    assert all(1 <= ratio <= 1.15 for ratio in over.values()), {k: v for k, v in over.items() if not 1 <= v <= 1.15}
    assert all(ratio <= 1.05 for key, ratio in over.items() if key[0] in adaln_cases.OPERATIONS and key[1] == "forward")


def test_the_rule_of_the_least_finds_what_tiles_add(monkeypatch):
    """Weight gradients in parts per image, and sums per narrow tile: the launches then move too much, and it shows."""
    launch = mix_cases.mixer
    monkeypatch.setattr(launch, "images_per_program", lambda *sizes: 1)
    narrow = [launch.hidden_configs(64, torch.bfloat16, torch.bfloat16)[0] | {"BLOCK_D": 8}]
    monkeypatch.setattr(launch, "hidden_configs", lambda *sizes: narrow)
    over = {
        (case.launch, case.shape): case.moved / case.least
        for case in mix_cases.aot_cases([MIX[0], mix_cases.SHAPES[2]], every_configuration=False)
    }  # fmt: skip
    assert {launch for (launch, _), ratio in over.items() if ratio > 1.15} >= {"hidden", "tokens second"}
    assert all(ratio == 1 for (launch, _), ratio in over.items() if launch in ("statistics", "mix"))


def test_the_rule_of_the_least_finds_parts_of_too_few_rows(monkeypatch):
    """Sums over four rows a part: the backward of the adaLN operations then moves too much, and it shows."""
    launch = adaln_cases.adaln
    few = [config | {"ROWS": 4} for config in launch.backward_configs(1152, 2, 3, False)]
    monkeypatch.setattr(launch, "backward_configs", lambda *sizes: few)
    for operation in adaln_cases.OPERATIONS.values():
        ratios = {c.launch: c.moved / c.least for c in operation.aot_cases(adaln_cases.SHAPES[:1], False)}
        assert ratios["backward"] > 1.15 and ratios["forward"] == ratios["sums"] == 1


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
        elif operation in adaln_cases.OPERATIONS:
            # The parts of the sums are written and read once more; at a quarter of the tokens they weigh most.
            assert row["over_least"] <= (1.02 if direction == "forward" else 1.18 if "K64" in shape else 1.15), row
            assert row["of_unfused"] <= (1 / 1.6 if operation == "gated_residual" else 1 / 2.5), row
        elif direction == "forward":
            # x is read twice and K rows are written: at a quarter 2.25 / 1.25 = 1.8, even if nothing else moved. There
            # L2, which has what `statistics` read last, has to help; at half and above the goal is met without.
            assert row["over_least_l2"] <= 1.8, row
            assert row["over_least"] <= (1.83 if "K64" in shape else 1.8), row
            if "KNone" not in shape:
                assert row["of_unfused"] <= 1 / 5, row
    assert {key[0] for key in rows} >= {
        "subset_cosine_alignment",
        "subset_cosine_alignment_loss",
        "mix_and_drop",
        *adaln_cases.OPERATIONS,
    }


def mix_misses(images, tile_bytes, out_bytes, at_a_time, capacity, backwards):
    """Bytes of x that `mix` has to fetch again, with an L2 that drops what was used longest ago.

    `statistics` has read the images in order, in eight tiles each. `at_a_time` images run side by side: they go through
    their tiles once for the product and once more for the kept rows, which they write.
    """
    lines = collections.OrderedDict()

    def touch(name, size):
        missed = lines.pop(name, None) is None
        lines[name] = size
        while sum_of[0] + missed * size > capacity and len(lines) > 1:
            sum_of[0] -= lines.popitem(last=False)[1]
        sum_of[0] += missed * size
        return missed * size

    sum_of, missed = [0], 0
    for image in range(images):
        for tile in range(8):
            touch((image, tile), tile_bytes)
    order = range(images - 1, -1, -1) if backwards else range(images)
    for start in range(0, images, at_a_time):
        together = order[start : start + at_a_time]
        missed += sum(touch((image, tile), tile_bytes) for tile in range(8) for image in together)
        for tile in range(8):
            for image in together:
                touch((image, tile), tile_bytes)
                touch((image, tile, "out"), out_bytes)
    return missed


@pytest.mark.parametrize("keep", [1, 0.5, 0.25])
@pytest.mark.parametrize("tokens, at_a_time", [(256, 8), (256, 24), (256, 32), (1024, 8), (1024, 9)])
def test_what_counts_as_still_in_l2_is(keep, tokens, at_a_time):
    """Half of A100's L2 keeps what the report says, with as many images at a time as its processors hold; forwards, it
    would not.
    """
    shape = (32, tokens, int(keep * tokens), 1152, 64, torch.bfloat16, torch.bfloat16, torch.bfloat16)
    warm = {case.launch: case.warm for case in mix_cases.aot_cases([shape], every_configuration=False)}
    assert {launch for launch, size in warm.items() if size} == {"mix"}
    tile = tokens * 1152 * 2 // 8
    sizes = (32, tile, int(keep * tile), at_a_time, mix_cases.WARM)
    rows, missed, forwards = 32 * 8 * tile, mix_misses(*sizes, True), mix_misses(*sizes, False)
    assert rows - missed >= 0.93 * warm["mix"], (rows - missed, warm["mix"])  # In whole tiles of images.
    if tokens == 1024:
        assert forwards == rows


def test_the_unfused_chain_is_counted_operation_by_operation():
    x = torch.empty(4, 8, device="meta", dtype=torch.float32)
    with kernel_report.BytesMoved() as count:
        y = x.t() * 2  # The view is free, the product reads and writes 32 floats.
        y.add_(torch.empty((), device="meta").expand(8, 4))  # Reads and writes 32, and one broadcast float.
    assert count.total == 4 * (32 + 32) + 4 * (2 * 32 + 1)


def test_faults_are_found():
    good = {"spills": 0, "stack": 0, "narrowest_row_access": 16, "over_least": 1.0, "occupancy": 0.1}
    good |= {"shared": 1 << 20, "registers": 99}
    assert kernel_report.faults(good) == []
    bad = {"spills": 3, "stack": 8, "narrowest_row_access": 8, "over_least": 1.2, "occupancy": 0}
    for name, value in bad.items():
        assert len(kernel_report.faults({**good, name: value})) == 1


def test_widths_of_an_unaligned_build_are_seen():
    """The check has teeth: rows of odd pitch cannot be read 16 bytes at a time, and the report says so."""
    import dataclasses

    case = next(iter(alignment_cases.aot_cases(ALIGNMENT[:1], every_configuration=False)))
    odd = dataclasses.replace(case, arguments={**case.arguments, "student_row": 771, "student_batch": 771 * 128})
    for target in ("sm_90", "gfx942"):
        assert aot.build(case, target).narrowest_row == 16
        narrow = aot.build(odd, target)
        assert narrow.narrowest_row == 2
        assert {size for name, _, size in narrow.access if name == "teacher_ptr"} == {16}


def test_spills_are_seen():
    """A launch in far too few threads has to spill."""
    import dataclasses

    case = next(iter(alignment_cases.aot_cases(ALIGNMENT[:1], every_configuration=False)))
    case = dataclasses.replace(case, num_warps=1, waves=1, constexprs={**case.constexprs, "ROWS": 8, "BLOCK_C": 512})
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
    for name in ("kernels-builds.csv", "kernels-operations.csv"):
        with open(tmp_path / name) as file:
            assert len(list(csv.DictReader(file))) > 20
