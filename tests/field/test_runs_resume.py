# ruff: noqa: F401, F811 (fixtures are imported)
"""A run that resumes is the same run: what would make it another one is refused, what may change is named."""

import json
import shutil

import pytest

from maskalign.checkpoints.layout import complete_checkpoints
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.training.logs import read_metrics
from tests.tiny_runs import command, data_set, data_set_of, run, write_data_set

CLASS_TOKEN = dict(model__class_token="true", model__mixer="attention", method__keep_ratio=0.75)


def contents(folder):
    """{path: bytes} of a run folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-50] ^= 16
    path.write_bytes(data)


def damage_all(run_dir):
    for checkpoint in complete_checkpoints(run_dir):
        flip(next(checkpoint.glob("*.safetensors")))


# What the first run has, by the name of the setting in the message.
OTHER = {
    "model.heads": dict(model__heads=4),
    "model.mixer": dict(model__mixer="depthwise_conv"),
    "model.mixer_hidden": dict(model__mixer_hidden=5),
    "model.qk_norm": dict(model__qk_norm="true"),
    "model.mlp_ratio": dict(model__mlp_ratio=2),
    "model.projector": dict(model__projector="conv", method__keep_ratio=1.0),
    "model.projector_dim": dict(model__projector_dim=9),
    "model.depth": dict(model__depth=3),
    "method.align_depth": dict(method__align_depth=2),
    "method.route": dict(method__route="[0, 1]"),
    "method.restore": dict(method__route="[0, 2]", method__restore="bypass"),
    "objective.path": dict(objective__path="cosine"),
    "objective.time": dict(objective__time="lognormal"),
    "objective.label_dropout": dict(objective__label_dropout=0.2),
    "seed": dict(seed=1),
}


@pytest.fixture
def begun(run, tmp_path):
    """A run of two steps."""
    run(training__max_steps=2)
    return tmp_path / "run"


@pytest.mark.parametrize("setting", OTHER)
def test_another_model_or_objective_is_refused_and_nothing_is_touched(begun, run, setting):
    before = contents(begun)
    with pytest.raises(UsageError) as error:
        run(training__max_steps=4, **OTHER[setting])
    message = str(error.value)
    assert setting in message and "\n" not in message and "--run_dir NEW" in message
    assert contents(begun) == before
    assert run(training__max_steps=3)["step"] == 3


def test_a_preset_and_the_sizes_that_it_stands_for_are_the_same(run):
    own = dict(model__width=384, model__heads=6, method__align_depth=1, training__batch_size=2)
    run(**own, training__max_steps=1, model__depth=2)
    assert run(**own, model__preset="SiT-S/4", model__depth=2, training__max_steps=2)["step"] == 2
    with pytest.raises(UsageError, match="model.depth 2 .now 12."):
        run(**own, model__preset="SiT-S/4", model__depth=12, training__max_steps=3)


def test_what_may_change_is_named_with_its_old_and_new_value(begun, run, capsys):
    capsys.readouterr()
    run(training__max_steps=4, optimizer__lr=0.001, training__log_every=2, method__keep_ratio=0.75)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("changed since step 2: ")]
    for change in (
        "optimizer.lr 0.003 -> 0.001",
        "training.max_steps 2 -> 4",
        "log_every 1 -> 2",
        "keep_ratio 0.5 -> 0.75",
    ):
        assert change in line
    assert f"resumed from step 2 of {begun / 'checkpoints' / 'step_00000002'}" in out
    run(training__max_steps=5, optimizer__lr=0.001, training__log_every=2, method__keep_ratio=0.75)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("changed since")]
    assert line == "changed since step 4: training.max_steps 4 -> 5"


def test_another_plan_may_resume_and_is_named(begun, run, capsys):
    run(training__max_steps=3, parallel__plan="fsdp")
    assert "parallel.plan none -> fsdp" in capsys.readouterr().out


def test_pictures_that_were_added(begun, run, data_set, tmp_path):
    shutil.rmtree(data_set)
    write_data_set(data_set, samples=60)
    before = contents(begun)
    with pytest.raises(UsageError, match="holds 60 images in 5 shards, .* trained on 48 images: .*init_from"):
        run(training__max_steps=4)
    assert contents(begun) == before


def change_manifest(folder, **changes):
    manifest = Manifest.load(folder)
    for key, value in changes.items():
        setattr(manifest, key, value)
    manifest.save(folder)


@pytest.mark.parametrize(
    "names, message",
    [
        (["ant", "bee", "dog"], "other classes .*label 2 is 'cat' and 'dog'"),
        (["bee", "ant", "cat"], "the same names in another order, label 0 is 'ant' and 'bee'"),
        (["ant", "bee", "cat", "dog"], "number of classes 3, the data now have 4"),
    ],
    ids=["renamed", "reordered", "more"],
)
def test_classes_that_are_others(begun, run, data_set, names, message):
    change_manifest(data_set, class_names=names)
    with pytest.raises(UsageError, match=message):
        run(training__max_steps=4)


def test_images_built_anew_in_equal_number_are_named(begun, run, data_set, capsys):
    change_manifest(data_set, extra={"build": {"fingerprint": "another"}})
    run(training__max_steps=3)
    assert "the images were rebuilt" in capsys.readouterr().out


def test_features_made_in_another_way(begun, run, data_set):
    (name, entry) = next(iter(Manifest.load(data_set).teachers.items()))
    change_manifest(data_set, teachers={name: entry | {"normalize": "spatial"}})
    with pytest.raises(UsageError, match=f"features of {name} were made with normalize none .now spatial."):
        run(training__max_steps=4)


def test_another_teacher_of_the_same_width(run, data_set):
    entry = next(iter(Manifest.load(data_set).teachers.values()))
    run(training__max_steps=1)
    other = "timm:vit_tiny_patch16_224"
    change_manifest(data_set, teachers=Manifest.load(data_set).teachers | {other: entry})
    with pytest.raises(UsageError, match="was aligned with efficientnet-lite0, now it would be with timm:vit_tiny"):
        run(teacher__names=f"[{other}]", training__max_steps=2)


def test_another_batch_size(begun, run, capsys):
    with pytest.raises(UsageError, match="training.batch_size: 12, .*multiples of 8"):
        run(training__max_steps=4, training__batch_size=12)
    run(training__max_steps=3, training__batch_size=16)
    assert "training.batch_size 8 -> 16" in capsys.readouterr().out


def test_latents_of_another_scale(run, data_set_of, tmp_path):
    data_set_of("latents", latent=True)
    own = dict(data__path=tmp_path / "latents", model__patch_size=2)
    run(**own, training__max_steps=1)
    latent = Manifest.load(tmp_path / "latents").latent
    change_manifest(tmp_path / "latents", latent=latent | {"scale": 1.0})
    with pytest.raises(UsageError, match="latents with scale 0.18215, those of the data have 1.0"):
        run(**own, training__max_steps=2)


def test_a_run_with_a_class_token(run, data_set_of, tmp_path, capsys):
    data_set_of("classes", class_token=True)
    own = CLASS_TOKEN | dict(data__path=tmp_path / "classes", method__keep_multiple=4)
    run(**own, training__max_steps=2)
    for changes, message in (
        (dict(model__class_token="false"), "model.class_token True .now False."),
        (dict(model__class_token_dim=3), "model.class_token_dim None .now 3."),
        (dict(model__mixer_layers=1), "model.mixer_layers 2 .now 1."),
        (dict(model__heads=4), "model.heads"),
    ):
        with pytest.raises(UsageError, match=message):
            run(**own | changes, training__max_steps=4)
    capsys.readouterr()
    run(**own, method__class_weight=0.1, training__max_steps=3)
    assert "method.class_weight 0.03 -> 0.1" in capsys.readouterr().out
    name, entry = next(iter(Manifest.load(tmp_path / "classes").teachers.items()))
    shifted = entry["class_token"] | {"mean": [value + 1 for value in entry["class_token"]["mean"]]}
    change_manifest(tmp_path / "classes", teachers={name: entry | {"class_token": shifted}})
    with pytest.raises(UsageError, match="class tokens are of another teacher, or standardized"):
        run(**own, training__max_steps=4)


def test_runs_from_before_facts_of_the_data_were_kept_resume(begun, run):
    path = complete_checkpoints(begun)[-1]
    state = json.loads((path / "state.json").read_text())
    for key in ("data", "class_dim"):
        state["facts"].pop(key, None)
    text = json.dumps(state)
    (path / "state.json").write_text(text)
    marked = json.loads((path / "COMPLETE").read_text())
    marked = {name: entry["size"] for name, entry in marked.items()} | {"state.json": len(text)}
    (path / "COMPLETE").write_text(json.dumps(marked))
    assert run(training__max_steps=3)["step"] == 3


@pytest.mark.parametrize("how", ["damaged", "gone"])
def test_without_any_checkpoint_left_the_run_stops_and_asks(run, tmp_path, how):
    own = dict(training__checkpoint_every=2, training__max_steps=5)
    run(**own)
    folder = tmp_path / "run"
    if how == "damaged":
        damage_all(folder)
    else:
        shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    with pytest.raises(UsageError) as error:
        run(**own | dict(training__max_steps=8))
    message = str(error.value)
    assert "\n" not in message and "--training.resume restart" in message and "--run_dir NEW" in message
    assert ("is damaged" if how == "damaged" else "its checkpoints are gone") in message
    assert contents(folder) == before
    # In a fresh folder, and where somebody says so.
    assert run("fresh", **own, training__resume="never")["step"] == 5
    assert run(**own | dict(training__max_steps=3), training__resume="restart")["step"] == 3
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [1, 2, 3]
    assert [row["step"] for row in read_metrics(folder / "aside_metrics.csv")] == [1, 2, 3, 4, 5]
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000002", "step_00000003"]
    assert run(**own | dict(training__max_steps=4))["step"] == 4


def test_stopped_before_its_first_checkpoint_a_run_begins_again(run, tmp_path):
    run(training__max_steps=3)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("max_steps: 3", "max_steps: 100"))
    assert run(training__max_steps=4)["step"] == 4
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.csv")] == [1, 2, 3, 4]
