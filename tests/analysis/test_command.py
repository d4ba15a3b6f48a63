"""`maskalign analyze` as a user meets it: files, words, repeats, and one line for every mistake."""

import csv
import shutil

import numpy as np
import pytest

from maskalign.analysis.command import analyze
from maskalign.analysis.outcome import beyond
from maskalign.analysis.settings import AnalysisSettings, parse_times
from maskalign.analysis.subjects import find_checkpoints
from maskalign.checkpoints.weight_files import repa_checkpoint, write_repa
from maskalign.cli import main
from maskalign.errors import UsageError

TEACHER = "efficientnet-lite0"
SMALL = ["--images", "12", "--times", "0.3,0.7", "--draws", "2", "--permutations", "50", "--progress", "false"]
FEW = AnalysisSettings(images=8, times=(0.5,), draws=2, permutations=20)


def status_of(argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    return end.value.code


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_two_runs(masked_run, full_run, data_set, tmp_path, capsys):
    argv = ["analyze", str(masked_run), str(full_run), "--data", str(data_set), "--batch-size", "6", *SMALL]
    assert status_of([*argv, "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "one" / "outcome.md")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    tables = {"shares.csv", "gap.csv", "positions.csv", "stability.csv", "concentration.csv", "agreement.csv"}
    pictures = {
        "shares.png",
        "gap.png",
        "maps-masked.png",
        "maps-full.png",
        "training-masked.png",
        "training-full.png",
        "curves.png",
    }
    assert names == tables | pictures | {"outcome.md"}

    positions = rows_of(tmp_path / "one" / "positions.csv")
    assert len(positions) == 2 * (3 + 2) * 3 * 16  # checkpoints, ways of the two runs, times and their mean, tokens
    assert {(row["run"], row["step"]) for row in positions} == {(r, s) for r in ("masked", "full") for s in "24"}
    stability = rows_of(tmp_path / "one" / "stability.csv")
    kinds = {(row["level"], row["between"]) for row in stability}
    assert ("single images", "checkpoints") in kinds and ("mean map", "runs") in kinds and len(kinds) == 9
    for row in stability:
        assert 0 <= float(row["overlap"]) <= 1 and -1.001 <= float(row["spearman"]) <= 1.001
        assert float(row["overlap_low"]) <= float(row["overlap_chance"]) <= float(row["overlap_high"])

    # The outcome has the numbers of the tables.
    outcome = (tmp_path / "one" / "outcome.md").read_text()
    halves = next(
        row for row in stability
        if (row["run"], row["step"], row["mode"], row["between"]) == ("full", "4", "full", "halves of the data")
    )  # fmt: skip
    assert f"| full | mean map | halves of the data | {float(halves['overlap']):.3f} (" in outcome
    assert "12 images" in outcome and "| masked | 2, 4 |" in outcome
    for block in outcome.split("\n\n"):  # every table has as many cells in each row as in its head
        if block.startswith("| "):
            assert len({line.count(" | ") for line in block.strip().splitlines()}) == 1, block

    assert status_of([*argv, "--out", str(tmp_path / "two")]) == 0
    for name in tables | {"outcome.md"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_raw_weights_are_others(masked_run, data_set, tmp_path):
    analyze([masked_run], data_set, tmp_path / "ema", settings=FEW, most=1, progress=False)
    analyze([masked_run], data_set, tmp_path / "raw", settings=FEW, most=1, ema=False, progress=False)
    ema, raw = (rows_of(tmp_path / kind / "positions.csv") for kind in ("ema", "raw"))
    assert {row["step"] for row in ema} == {"4"}
    assert not np.allclose([float(row["norm"]) for row in ema], [float(row["norm"]) for row in raw], rtol=1e-4)
    assert "not averaged" in (tmp_path / "raw" / "outcome.md").read_text()
    assert not (tmp_path / "ema" / "training-masked.png").exists()


def test_a_repa_file_takes_its_teacher_from_the_data(full_run, data_set, tmp_path):
    from maskalign.checkpoints import load_model

    model = load_model(full_run)
    write_repa(tmp_path / "model.pt", repa_checkpoint(model, model, steps=4))
    analyze([tmp_path / "model.pt"], data_set, tmp_path / "file", settings=FEW, progress=False)
    analyze([full_run], data_set, tmp_path / "run", settings=FEW, most=1, progress=False)
    file, run = (rows_of(tmp_path / kind / "positions.csv") for kind in ("file", "run"))
    norms = [[float(row["norm"]) for row in rows] for rows in (file, run)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    with pytest.raises(UsageError, match="--teacher"):
        analyze(
            [tmp_path / "model.pt"], data_set, tmp_path / "x", settings=FEW, teachers=(TEACHER,) * 2, progress=False
        )


def test_latents_and_an_online_teacher(make_data, make_run, tmp_path):
    data = make_data(tmp_path / "data", samples=16, grid=(2, 2), latent=True)
    run = make_run(data, tmp_path / "latents", training__max_steps=1, method__keep_ratio=1, model__projector="conv")
    settings = AnalysisSettings(images=8, times=(0.5,), draws=2, permutations=20, keep_ratio=0.5)
    with pytest.raises(UsageError, match="keep-ratio"):  # 4 tokens: eight at a time is all of them
        analyze([run], data, tmp_path / "out", settings=settings, progress=False)
    data = make_data(tmp_path / "plain", samples=16, features=False)
    run = make_run(data, tmp_path / "online", training__max_steps=1, teacher__weights="random")
    outcome = analyze([run], data, tmp_path / "out", settings=FEW, progress=False).read_text()
    assert TEACHER in outcome and "| online | 1 |" in outcome
    data = make_data(tmp_path / "latent16", samples=16, size=32, latent=True)
    run = make_run(data, tmp_path / "conv", training__max_steps=1, method__route="none", model__projector="conv")
    assert analyze([run], data, tmp_path / "out", settings=FEW, progress=False).exists()


def test_a_run_without_alignment_is_refused(make_run, data_set, tmp_path, capsys):
    run = make_run(data_set, tmp_path / "sit", method__align_weight=0, training__max_steps=1)
    assert status_of(["analyze", str(run), "--data", str(data_set), "--out", str(tmp_path / "out"), *SMALL]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "has no projectors" in lines[0] and "align_weight" in lines[0]


@pytest.mark.parametrize(
    "options, words",
    [
        (["--times", "0,0.5"], ["--times", "between 0"]),
        (["--times", "0.5,0.2"], ["--times", "rise"]),
        (["--times", "noon"], ["--times", "noon"]),
        (["--draws", "1"], ["--draws"]),
        (["--top", "0.9"], ["--top"]),
        (["--images", "2"], ["--images"]),
        (["--keep-ratio", "1"], ["--keep-ratio"]),
        (["--keep-ratio", "0.99"], ["--keep-ratio", "16 of 16"]),
        (["--most", "0"], ["--most"]),
        (["--teacher", "nobody"], ["nobody"]),
        (["--teacher", "timm:resnet10t,efficientnet-lite0:16"], ["--teacher"]),
        (["--data", "nowhere"], ["nowhere"]),
        (["--device", "tpu"], ["--device"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_mistakes_are_one_line(masked_run, data_set, tmp_path, capsys, options, words):
    argv = ["analyze", str(masked_run), "--data", str(data_set), "--out", str(tmp_path / "out")]
    if "--teacher" in options and "," in options[1]:
        options = ["--teacher", "efficientnet-lite0,efficientnet-lite0:16"]  # one teacher more than projectors
    assert status_of([*argv, *SMALL, *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines


def test_data_of_another_shape_is_refused(masked_run, make_data, tmp_path):
    other = make_data(tmp_path / "other", size=32)
    with pytest.raises(UsageError, match="3 x 32 x 32.*3 x 16 x 16"):
        analyze([masked_run], other, tmp_path / "out", settings=FEW, progress=False)


def test_weights_that_are_not_finite_are_named(full_run, data_set, tmp_path):
    from maskalign.checkpoints import load_model

    model = load_model(full_run)
    model.blocks[0].mlp.fc1.weight[0, 0] = float("nan")
    write_repa(tmp_path / "broken.pt", repa_checkpoint(model, model))
    with pytest.raises(UsageError, match="not finite"):
        analyze([tmp_path / "broken.pt"], data_set, tmp_path / "out", settings=FEW, progress=False)


def test_which_checkpoints_a_path_means(masked_run, tmp_path):
    steps = [entry.path.name for entry in find_checkpoints([masked_run])]
    assert steps == ["step_00000002", "step_00000004"]
    last = masked_run / "checkpoints" / "step_00000004"
    assert [entry.path.name for entry in find_checkpoints([last, masked_run])] == steps  # in order, none twice
    assert [entry.path.name for entry in find_checkpoints([masked_run], most=1)] == steps[1:]
    shutil.copytree(masked_run, tmp_path / masked_run.name)
    runs = {entry.run for entry in find_checkpoints([masked_run, tmp_path / masked_run.name])}
    assert runs == {f"{folder.parent.name}/masked" for folder in (masked_run, tmp_path / "masked")}
    with pytest.raises(UsageError, match="no complete checkpoint"):
        find_checkpoints([tmp_path])
    with pytest.raises(UsageError, match="cannot tell"):
        find_checkpoints([__file__])


def test_beyond_chance_is_more_than_chance_reaches():
    assert [beyond(value, 0.15) for value in (0.05, 0.15, 0.15 + 1e-9, 0.18)] == ["no", "no", "no", "yes"]


def test_times():
    assert parse_times("0.1, 0.5") == (0.1, 0.5) and parse_times("[0.25]") == (0.25,)
