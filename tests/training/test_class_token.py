"""Training with a class token: it is learned, logged, saved and resumed, and nothing else changes."""

import pytest
import torch

from maskalign.errors import UsageError
from maskalign.training.logs import read_metrics

PAPER = dict(model__class_token="true", model__mixer="attention", method__keep_ratio=0.75, method__keep_multiple=4)


@pytest.fixture
def classes(data_set_of, tmp_path):
    """A data set whose teacher has class tokens."""
    data_set_of("classes", class_token=True)
    return tmp_path / "classes"


def losses(path):
    names = ("loss", "velocity_loss", "align_loss", "class_velocity_loss", "grad_norm")
    return {row["step"]: tuple(row[name] for name in names) for row in read_metrics(path / "metrics.csv")}


def test_the_papers_recipe_trains_and_logs_its_parts(run, classes, tmp_path):
    run(**PAPER, data__path=classes, training__max_steps=120, optimizer__lr=0.01)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    for row in rows:
        total = row["velocity_loss"] + 0.03 * row["class_velocity_loss"] + 0.5 * row["align_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["keep_ratio"] == 0.75
    for name in ("class_velocity_loss", "velocity_loss", "align_loss"):
        assert sum(row[name] for row in rows[-20:]) < sum(row[name] for row in rows[:20]), name


def test_the_class_weight_is_a_setting(run, classes, tmp_path):
    run(**PAPER, data__path=classes, method__class_weight=2.0, training__max_steps=1)
    (row,) = read_metrics(tmp_path / "run" / "metrics.csv")
    total = row["velocity_loss"] + 2 * row["class_velocity_loss"] + 0.5 * row["align_loss"]
    assert row["loss"] == pytest.approx(total, rel=1e-5)


def test_resuming_is_bit_for_bit(run, classes, tmp_path):
    run("whole", **PAPER, data__path=classes)
    run("parts", **PAPER, data__path=classes, training__max_steps=3)
    run("parts", **PAPER, data__path=classes)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_accumulation_gives_the_same_losses(run, classes, tmp_path):
    for name, parts in (("one", 1), ("four", 4)):
        run(name, **PAPER, data__path=classes, training__batch_size=16, training__accumulation=parts)
    one, four = losses(tmp_path / "one"), losses(tmp_path / "four")
    assert all(one[step] == pytest.approx(four[step], rel=1e-5) for step in one)


def test_without_alignment_the_class_token_is_still_read_and_learned(run, classes, tmp_path):
    run(**PAPER, data__path=classes, method__align_weight=0, training__max_steps=2)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert all(row["class_velocity_loss"] > 0 and row["align_loss"] == 0 for row in rows)


def test_principal_components_take_the_place_of_a_wide_class_token(run, classes, tmp_path):
    from maskalign.checkpoints import load_model

    run(**PAPER, data__path=classes, model__class_token_dim=3, training__max_steps=2)
    assert load_model(tmp_path / "run").class_dim == 3
    with pytest.raises(UsageError, match="class_token_dim"):
        run("more", **PAPER, data__path=classes, model__class_token_dim=5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_mixers_along_the_grid_train_with_a_class_token(run, classes, precision):
    for mixer in ("token_mlp", "depthwise_conv", "none"):
        own = PAPER | dict(model__mixer=mixer, training__precision=precision)
        assert run(mixer, **own, data__path=classes, training__max_steps=2)["finished"]


def test_a_data_set_without_class_tokens_is_told_how_to_get_them(run):
    with pytest.raises(UsageError, match="class token.*maskalign data encode.*--class-token only"):
        run(**PAPER)


def test_a_class_token_changes_no_other_draw(run, classes, tmp_path):
    """Time, noise, labels and subset are those of a run without one: the first velocity loss, before any update, of a
    model whose velocity head is zero is the same."""
    run("with", **PAPER, data__path=classes, training__max_steps=1)
    run("without", **(PAPER | dict(model__class_token="false")), data__path=classes, training__max_steps=1)
    first, second = (read_metrics(tmp_path / name / "metrics.csv")[0]["velocity_loss"] for name in ("with", "without"))
    assert first == pytest.approx(second, rel=1e-6)
    assert torch.isfinite(torch.tensor(first))
