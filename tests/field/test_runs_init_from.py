# ruff: noqa: F401, F811 (fixtures are imported)
"""A new run from the weights of another model: what fits is loaded, what does not starts fresh and is named."""

import math

import pytest
import torch

from maskalign.checkpoints import convert, load_model
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from tests import tiny_runs
from tests.tiny_runs import TEACHER, command, data_set, data_set_of, run, write_data_set

LABELS = "y_embedder.embedding_table.weight"
STILL = dict(training__max_steps=1, optimizer__lr=1e-12, optimizer__ema_decay=0.0)


@pytest.fixture
def first(run, tmp_path):
    """A run of a few steps, whose weights are far from those of a new model."""
    run("first", training__max_steps=3, optimizer__lr=0.1, optimizer__ema_decay=0.0)
    return tmp_path / "first"


def continued(run, capsys, tmp_path, source, name="second", **changes):
    """(weights before, weights after, the line) of a run that starts from another one and does not move."""
    capsys.readouterr()
    run(name, **STILL | changes, training__init_from=source)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training.init_from:")]
    before = dict(load_model(source).named_parameters())
    return before, dict(load_model(tmp_path / name).named_parameters()), line


def assert_positions(model, counted):
    """Channel 0 of the width axis is sin(position), the middle of a token its place in an image of `counted` tokens."""
    side = model.grid[0]
    expected = [math.sin((i + 0.5) * counted / side - 0.5) for i in range(side)]
    assert model.pos_embed[0, :side, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert model.pos_embed[0, ::side, model.width // 2].tolist() == pytest.approx(expected, abs=1e-6)


def same(a, b):
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)


def change_manifest(folder, **changes):
    manifest = Manifest.load(folder)
    for key, value in changes.items():
        setattr(manifest, key, value)
    manifest.save(folder)


def test_the_same_model_is_taken_whole(first, run, capsys, tmp_path):
    before, after, line = continued(run, capsys, tmp_path, first)
    assert all(same(before[name], after[name]) for name in before)
    assert f"{len(before)} of {len(before)} tensors from {first}, step 3" in line and "fresh" not in line


@pytest.mark.parametrize("names", [["ant", "bee", "cat", "dog", "eel"], ["x", "y", "z"]], ids=["more", "renamed"])
def test_other_classes_get_a_fresh_label_table_that_keeps_no_class(first, run, capsys, data_set, tmp_path, names):
    change_manifest(data_set, class_names=names)
    before, after, line = continued(run, capsys, tmp_path, first)
    table, old = after[LABELS], before[LABELS]
    assert table.shape[0] == len(names) + 1 and same(table[-1], old[-1])
    assert not any(torch.allclose(row, other, atol=1e-3) for row in table[:-1] for other in old)
    assert all(same(before[name], after[name]) for name in before if name != LABELS)
    assert 'the row of "no class" is kept' in line and "\n" not in line
    assert (f"{len(names)} classes, there 3" if len(names) != 3 else "other names") in line


def test_the_same_classes_in_another_order_keep_their_rows(first, run, capsys, data_set, tmp_path):
    change_manifest(data_set, class_names=["cat", "ant", "bee"])
    before, after, line = continued(run, capsys, tmp_path, first)
    assert same(after[LABELS], before[LABELS][[2, 0, 1, 3]]) and "order of classes" in line


@pytest.mark.parametrize("mixer, fresh", [("token_mlp", True), ("attention", False)])
def test_another_input_size(run, capsys, tmp_path, data_set_of, mixer, fresh):
    run("first", training__max_steps=3, optimizer__lr=0.1, model__mixer=mixer, optimizer__ema_decay=0.0)
    data_set_of("large", size=24, grid=(6, 6))
    own = dict(data__path=tmp_path / "large", model__mixer=mixer)
    before, after, line = continued(run, capsys, tmp_path, tmp_path / "first", **own)
    assert "position embedding resampled from 4x4 to 6x6 tokens (input size 24, there 16)" in line
    assert_positions(load_model(tmp_path / "second"), 4)
    # A resumed run, an export of it and a run from that know which grid the positions are counted by.
    run("second", **STILL | own | dict(training__max_steps=2))
    assert_positions(load_model(tmp_path / "second"), 4)
    convert(tmp_path / "second", tmp_path / "out.safetensors")
    assert_positions(load_model(tmp_path / "out.safetensors"), 4)
    _, _, again = continued(run, capsys, tmp_path, tmp_path / "out.safetensors", name="third", **own)
    assert "resampled" not in again
    assert_positions(load_model(tmp_path / "third"), 4)
    assert ("mixer (of other sizes there)" in line) == fresh
    loaded = [name for name in before if not (fresh and name.startswith("mixer."))]
    assert loaded and all(same(before[name], after[name]) for name in loaded)


def test_another_teacher_width_gets_a_fresh_projector(first, run, capsys, tmp_path, data_set_of):
    data_set_of("wide", dim=10)
    before, after, line = continued(run, capsys, tmp_path, first, data__path=tmp_path / "wide")
    assert f"projector to {TEACHER} (10 wide, there 6)" in line
    assert not same(before["projectors.0.0.weight"], after["projectors.0.0.weight"])
    rest = [name for name in before if not name.startswith("projectors.")]
    assert all(same(before[name], after[name]) for name in rest)


def test_another_teacher_of_the_same_width_and_another_tap_get_fresh_projectors(
    first, run, capsys, data_set_of, tmp_path, monkeypatch
):
    _, _, line = continued(run, capsys, tmp_path, first, method__align_depth=2)
    assert f"projector to {TEACHER} (at block 2, there at 1)" in line
    monkeypatch.setattr(tiny_runs, "TEACHER", "dinov2-s")
    data_set_of("other")
    own = dict(data__path=tmp_path / "other", teacher__names="[dinov2-s]")
    _, _, line = continued(run, capsys, tmp_path, first, name="third", **own)
    assert f"projector to dinov2-s (there to {TEACHER})" in line


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model__heads=4), r"model.heads 2 \(here 4\)"),
        (dict(model__depth=3), r"model.depth 2 \(here 3\)"),
        (dict(model__width=32), r"model.width 16 \(here 32\)"),
        (dict(model__patch_size=2), r"model.patch_size 4 \(here 2\)"),
        (dict(model__qk_norm="true"), "model.qk_norm"),
        (dict(model__mlp_ratio=2), "model.mlp_ratio"),
        (dict(objective__path="cosine"), "objective.path linear"),
    ],
)
def test_another_architecture_or_path_is_refused(first, run, tmp_path, changes, message):
    with pytest.raises(UsageError, match=message) as error:
        run("second", **STILL | changes, training__init_from=first)
    assert "\n" not in str(error.value) and not (tmp_path / "second").exists()


def test_an_exported_file_is_refused_like_the_run_it_came_from(first, run, tmp_path):
    from maskalign.checkpoints.command import convert

    convert(first, tmp_path / "w.safetensors", to="safetensors", weights="ema")
    with pytest.raises(UsageError, match=r"model.heads 2 \(here 4\)"):
        run("second", **STILL, model__heads=4, training__init_from=tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="objective.path"):
        run("second", **STILL, objective__path="cosine", training__init_from=tmp_path / "w.safetensors")


def test_a_bare_file_does_not_know_its_heads(first, run, capsys, tmp_path):
    weights = {name: tensor.detach().clone() for name, tensor in load_model(first).state_dict().items()}
    torch.save(weights, tmp_path / "bare.pt")
    capsys.readouterr()
    run("second", **STILL, model__heads=4, training__init_from=tmp_path / "bare.pt")
    assert "does not give its number of heads, so model.heads 4 is used" in capsys.readouterr().out


def test_class_tokens_are_added_loaded_and_renewed(first, run, capsys, tmp_path, data_set_of):
    data_set_of("classes", class_token=True)
    own = dict(model__class_token="true", model__mixer="attention", method__keep_ratio=0.75)
    own |= dict(data__path=tmp_path / "classes", method__keep_multiple=4)
    _, _, line = continued(run, capsys, tmp_path, first, name="added", **own)
    assert "class_embedder, final_layer.class_linear" in line
    run("token", **own, training__max_steps=3, optimizer__lr=0.1, optimizer__ema_decay=0.0)
    before, after, line = continued(run, capsys, tmp_path, tmp_path / "token", name="same", **own)
    assert all(same(before[name], after[name]) for name in before) and "fresh" not in line
    few = own | dict(model__class_token_dim=3)
    before, after, line = continued(run, capsys, tmp_path, tmp_path / "token", name="few", **few)
    assert "class token (3 numbers, there 6)" in line
    fresh = ("class_embedder.", "final_layer.class_linear.")
    assert all(same(before[name], after[name]) for name in before if not name.startswith(fresh))
    name, entry = next(iter(Manifest.load(tmp_path / "classes").teachers.items()))
    shifted = entry["class_token"] | {"mean": [value + 1 for value in entry["class_token"]["mean"]]}
    change_manifest(tmp_path / "classes", teachers={name: entry | {"class_token": shifted}})
    before, after, line = continued(run, capsys, tmp_path, tmp_path / "token", name="other", **own)
    assert "class token (of another teacher or with other statistics there)" in line


def test_a_resumed_run_says_that_it_does_not_read_the_weights_again(first, run, capsys):
    run("second", **STILL, training__init_from=first)
    capsys.readouterr()
    run("second", **STILL | dict(training__max_steps=2), training__init_from=first)
    assert "training.init_from: not read, since the run resumes" in capsys.readouterr().out


def test_a_sharded_model_starts_from_the_same_weights(first, run, capsys, data_set, tmp_path):
    change_manifest(data_set, class_names=["ant", "bee", "cat", "dog"])
    before, after, line = continued(run, capsys, tmp_path, first, parallel__plan="fsdp")
    assert same(after[LABELS][-1], before[LABELS][-1]) and "4 classes, there 3" in line
    assert all(same(before[name], after[name]) for name in before if name != LABELS)
