"""Evaluating models with a class token: losses against the definition, the right class token, and whole commands."""

import json

import numpy as np
import pytest
import torch

from maskalign.checkpoints import load
from maskalign.checkpoints.spec import ModelInfo
from maskalign.checkpoints.weight_files import reg_checkpoint, write_repa, write_safetensors
from maskalign.config import parse_config
from maskalign.data import ShardStream
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.evaluation import history
from maskalign.evaluation.heldout import (
    ClassTokens,
    HeldOut,
    TeacherTokens,
    choose_teachers,
    losses_by_time,
    teachers_of,
)
from maskalign.evaluation.losses import velocity_and_cosine
from maskalign.models import SiT
from maskalign.objective.interpolant import Interpolant
from maskalign.teachers.tokens import class_projection, project_class_token
from tests.tiny_runs import TEACHER, train_on, write_data_set

DIM = 6
RUN = dict(model__class_token="true", model__mixer="attention", training__max_steps=2)
WORDS = ["--samples", 6, "--steps", 2, "--reference", 16, "--held-out-images", 16, "--allow-singular", "--precision",
         "fp32", "--progress", "false"]  # fmt: skip


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A data set whose teacher has class tokens of six numbers."""
    folder = tmp_path_factory.mktemp("classes") / "data"
    write_data_set(folder, class_token=True)
    return folder


def make_model(seed=0, **settings):
    sizes = dict(input_size=16, patch_size=4, depth=2, width=16, heads=2, teacher_dims=(DIM,), align_depth=1,
                 projector_dim=8, mixer="attention", num_classes=3, in_channels=3, class_dim=DIM)  # fmt: skip
    model = SiT(**{**sizes, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval().requires_grad_(False)


def stored(path, count):
    """What the shards hold of the first images in the stream's order: rows and class tokens."""
    fields = [TEACHER, f"{TEACHER}.class"]
    batch = next(iter(ShardStream(path, count, seed=0, epochs=1, streams=1, fields=fields)))
    return batch[TEACHER].float(), batch[f"{TEACHER}.class"].float()


def chosen(path, names=(TEACHER,)):
    manifest = Manifest.load(path)
    return choose_teachers(list(names), manifest, manifest, class_tokens=True)


class Recording(torch.nn.Module):
    """Passes everything on to a model and keeps what it was given."""

    def __init__(self, model):
        super().__init__()
        self.model, self.grid, self.seen = model, model.grid, []

    def forward(self, x, t, labels, class_token=None):
        self.seen.append((x, t, labels, class_token))
        return self.model(x, t, labels, class_token=class_token)


@pytest.mark.parametrize("components", [None, 3])
@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_the_losses_are_the_definition(classes, components, projector):
    model = make_model(class_dim=components or DIM, projector=projector)
    probe = Recording(model)
    held_out = HeldOut(classes, 8, chosen(classes), batch_size=8, class_components=components)
    found = losses_by_time(probe, held_out, bins=2)
    assert set(found) == {"velocity_loss", "cosine", "class_velocity_loss"}
    ((_, x, _, _),) = held_out.batches()
    rows, class_token = stored(classes, 8)
    # The manifest's components are the first numbers, shifted by a half and divided by two.
    clean = class_token if components is None else (class_token[:, :3] - 0.5) / 2
    noises = []
    for index, (noised, t, labels, noised_class) in enumerate(probe.seen):
        wide = t.view(-1, 1, 1, 1)
        out = model(noised, t, labels, class_token=noised_class)
        # On the linear path x_t = (1 - t) x + t eps, so that eps - x = (x_t - x) / t.
        loss = (out.velocity - (noised - x) / wide).square().mean()
        assert found["velocity_loss"][index] == pytest.approx(float(loss), rel=1e-4)
        noises.append(clean + (noised_class - clean) / t[:, None])
        loss = (out.class_velocity - (noises[-1] - clean)).square().mean()
        assert found["class_velocity_loss"][index] == pytest.approx(float(loss), rel=1e-3)
        teacher = rows if projector == "conv" else torch.cat([class_token[:, None], rows], dim=1)
        assert out.aligned[0].shape[1] == (16 if projector == "conv" else 17)
        cosine = torch.cosine_similarity(out.aligned[0], teacher, dim=-1).mean()
        assert found["cosine"][index] == pytest.approx(float(cosine), abs=1e-5)
    torch.testing.assert_close(noises[0], noises[1], rtol=1e-3, atol=1e-3)  # an image keeps its noise in all bins
    assert 0.5 < noises[0].std() < 1.5 and not torch.allclose(noises[0][0], noises[0][1])


def test_the_result_depends_on_neither_batches_nor_chance(classes):
    model, results = make_model(), []
    for batch_size in (4, 7, 40):
        torch.manual_seed(batch_size)
        results.append(losses_by_time(model, HeldOut(classes, 20, chosen(classes), batch_size), bins=3))
    for found in results[1:]:
        for key, values in results[0].items():
            assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_models_without_class_token_give_what_they_gave(classes):
    """Their losses have two parts, and reading class tokens beside them would change neither."""
    model = make_model(class_dim=None)
    manifest = Manifest.load(classes)
    plain = choose_teachers([TEACHER], manifest, manifest)
    assert plain == [TeacherTokens(TEACHER, None, (4, 4))]
    found = losses_by_time(model, HeldOut(classes, 10, plain), bins=2)
    assert set(found) == {"velocity_loss", "cosine"}
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6])
    losses = velocity_and_cosine(model, x, torch.randn_like(x), t, torch.tensor([0, 1]), [], Interpolant())
    assert losses.class_velocity_loss is None and losses.cosines == []


def test_projected_class_tokens(seed):
    rng = np.random.default_rng(seed)
    values, basis = rng.normal(size=(7, 5)), np.linalg.qr(rng.normal(size=(5, 5)))[0]
    mean, scale = rng.normal(size=5), rng.uniform(0.5, 2, 5)
    entry = {"components": {"mean": mean.tolist(), "basis": basis.tolist(), "scale": scale.tolist()}}
    tokens = torch.from_numpy(values).half()
    for count in (1, 3, 5):
        expected = ((tokens.double().numpy() - mean) @ basis[:count].T) / scale[:count]
        found = project_class_token(tokens, entry, count)
        assert found.shape == (7, count) and found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    whole = project_class_token(tokens, entry)
    assert torch.equal(whole, tokens.float())
    for wrong in (entry, {}):
        with pytest.raises(ValueError, match="6 principal components"):
            class_projection(wrong, 6)


def test_class_tokens_of_another_data_set_are_standardized_anew(classes, seed):
    """Averages are stored with the statistics of their own data set; the model knows those of its training."""
    raw = torch.randn(4, DIM, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    stats = {"one": ([1.0] * DIM, [3.0] * DIM), "other": ([0.2] * DIM, [0.5] * DIM)}
    entries = {name: {"kind": "mean", "mean": mean, "std": std} for name, (mean, std) in stats.items()}
    values = {name: (raw - torch.tensor(mean)) / torch.tensor(std) for name, (mean, std) in stats.items()}
    found = ClassTokens(entries["one"], entries["other"]).as_trained(values["one"])
    torch.testing.assert_close(found, values["other"], rtol=1e-5, atol=1e-5)
    assert ClassTokens(entries["one"], entries["one"]).as_trained(raw) is raw
    prefix = {"kind": "prefix"} | {key: entries["one"][key] for key in ("mean", "std")}
    assert ClassTokens(prefix, prefix | {"mean": [9.0] * DIM}).as_trained(raw) is raw
    # The same through the choice of teachers.
    training, held_out = Manifest.load(classes), Manifest.load(classes)
    entry = training.teachers[TEACHER]
    training.teachers = {TEACHER: entry | {"class_token": entry["class_token"] | {"std": [2.0] * DIM}}}
    teachers = choose_teachers([TEACHER], training, held_out, class_tokens=True)
    half, plain = HeldOut(classes, 5, teachers, 5), HeldOut(classes, 5, chosen(classes), 5)
    ((_, _, _, a),), ((_, _, _, b),) = half.batches(), plain.batches()
    torch.testing.assert_close(half.class_token(a), plain.class_token(b) / 2)
    assert torch.equal(a[0][0], b[0][0])


def test_class_tokens_that_are_not_stored_are_computed(classes, data):
    """Rows without class tokens: the teacher is run, with the statistics of the training data."""
    training, held_out = Manifest.load(classes), Manifest.load(data)
    entry = training.teachers[TEACHER]
    wide = entry["class_token"] | {"dim": 320, "mean": [0.25] * 320, "std": [2.0] * 320}
    training.teachers = {TEACHER: entry | {"class_token": wide}}
    (teacher,) = choose_teachers([TEACHER], training, held_out, class_tokens=True)
    assert teacher.network is not None and teacher.grid == (4, 4)
    images = HeldOut(data, 3, [teacher], 3)
    ((_, x, _, teachers),) = images.batches()
    (tokens, grid, values) = teachers[0]
    assert tokens.shape == (3, 16, 320) and grid == (4, 4) and values.shape == (3, 320)
    pixels = ((x + 1) * 127.5).round().to(torch.uint8)
    rows = teacher.network.encoder(pixels).float()
    torch.testing.assert_close(images.class_token(teachers), (rows.mean(dim=1) - 0.25) / 2, rtol=1e-4, atol=1e-4)
    # Nothing knows the statistics of an average; and without images there is nothing to compute from.
    with pytest.raises(UsageError, match="standardized with the data set's statistics"):
        choose_teachers([TEACHER], held_out, held_out, class_tokens=True)
    held_out.image_format = None
    with pytest.raises(UsageError, match=r"no class tokens; .*--class-token only") as error:
        choose_teachers([TEACHER], training, held_out, class_tokens=True)
    assert "\n" not in str(error.value)


def test_whose_class_token_it_is():
    config = parse_config(["--model.preset", "SiT-B/2", "--model.class_token", "true", "--teacher.names",
                           "[dinov2-b,dinov2-l]", "--model.class_token_dim", "5"])  # fmt: skip
    assert teachers_of(["a", "b"], config, 5) == (["a", "b"], 5)
    assert teachers_of([], config, 5) == (["dinov2-b"], 5)  # nothing was aligned
    assert teachers_of([], config, None) == ([], None)
    assert teachers_of(["a"], None, 768) == (["a"], None)
    with pytest.raises(UsageError, match="teacher of the model's class token"):
        teachers_of([], None, 768)


@pytest.fixture(scope="module")
def run(classes):
    """A run with a class token, projected to four components, that was evaluated in training."""
    folder = classes.parent / "run"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    own = dict(evaluate__every=2, evaluate__images=16, evaluate__samples=6, evaluate__steps=2, evaluate__reference=16)
    own |= dict(evaluate__cfg_scale=1.5, evaluate__cls_cfg_scale=0.0, model__class_token_dim=4)
    train_on(classes, folder, **RUN, **own)
    torch.set_num_threads(before)
    return folder


def test_the_command_gives_the_numbers_of_training(run, classes, command):
    (row,) = history.read_history(run / history.FILE_NAME)
    status, out, err = command(
        "evaluate", run, "--data", classes, *WORDS, "--cfg-scale", 1.5, "--cls-cfg-scale", 0, "--cfg-interval", "0,1"
    )
    assert status == 0, err
    report = json.loads((run / "evaluation.json").read_text())
    assert set(report["held_out"]) == {"velocity_loss", "cosine", "class_velocity_loss"}
    keys = ["held_out_velocity_loss", "held_out_cosine", "held_out_class_velocity_loss", "kernel[efficientnet-lite0]"]
    for key in keys:
        assert row[key] == pytest.approx(report["metrics"][key], rel=1e-5, abs=1e-7), key
    for name, values in report["held_out"].items():
        assert {place: row[f"{name}[{place}]"] for place in values} == pytest.approx(values, rel=1e-5, abs=1e-7)
    assert report["settings"]["cls_cfg_scale"] == 0.0 and report["settings"]["cfg_scale"] == 1.5
    assert any("models without a class token" in note for note in report["notes"])
    assert "class token's" in out and "do not compare" in out
    # Without its own guidance the class token is guided as the image: other pictures.
    status, _, err = command("evaluate", run, "--data", classes, *WORDS, "--cfg-scale", 1.5)
    assert status == 0, err
    other = json.loads((run / "evaluation.json").read_text())
    assert other["settings"]["cls_cfg_scale"] is None
    assert other["metrics"][keys[0]] == report["metrics"][keys[0]]
    status, _, err = command("evaluate", run, "--data", classes, *WORDS, "--cls-cfg-scale", -2)
    assert status == 2 and "--cls-cfg-scale" in err[-1]


def test_a_run_draws_everything(run, classes, command, tmp_path):
    status, out, err = command(
        "sample", run, "--out", tmp_path / "a", "--steps", 2, "--per-class", 2, "--interpolate", "class", "--strip",
        "--animate", "apng", "--cls-cfg-scale", 1.5, "--sampler", "sde",
    )  # fmt: skip
    assert status == 0, err
    assert [line.rsplit("/")[-1] for line in out.split()] == [
        "grid.png", "interpolation.png", "strip.png", "denoising.png",
    ]  # fmt: skip
    for ending, sampler in (("b", "heun"), ("b", "heun")):  # the second one finds the set complete
        status, out, err = command(
            "sample", run, "--out", tmp_path / ending, "--npz", 5, "--sampler", sampler, "--steps", 2, "--batch-size", 2
        )
        assert status == 0, err
    assert np.load(tmp_path / "b" / "samples_5.npz")["arr_0"].shape == (5, 16, 16, 3)
    assert (run / "samples").is_dir() and any((run / "samples").iterdir())  # the run's own last preview


def test_a_run_that_aligned_nothing_is_evaluated(classes, command, tmp_path):
    train_on(classes, tmp_path / "run", **RUN, method__align_weight=0.0)
    status, _, err = command("evaluate", tmp_path / "run", "--data", classes, "--metrics", "none", *WORDS[-2:])
    assert status == 0, err
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(report["held_out"]) == {"velocity_loss", "class_velocity_loss"}


def test_what_cannot_be_measured_is_told_before_anything_is_drawn(run, classes, command, tmp_path, monkeypatch):
    monkeypatch.setattr("maskalign.evaluation.drawn.generate", lambda *a, **k: pytest.fail("drew first"))
    model = load(run).model
    plain = make_model(mixer="none")
    write_repa(tmp_path / "reg.pt", reg_checkpoint(plain, plain))
    info = ModelInfo(step=2, class_names=["ant", "bee", "cat"], teachers=[TEACHER])
    write_safetensors(tmp_path / "projected.safetensors", model, info)
    for name, match in [
        ("reg.pt", "teacher of the model's class token"),
        ("projected.safetensors", "principal components"),
    ]:
        status, _, err = command("evaluate", tmp_path / name, "--data", classes, *WORDS)
        assert status == 2 and match in err[-1] and "--held-out-images 0" in err[-1], err
    # The training data are gone: another data set's components would not be the model's.
    away = classes.with_name("away")
    classes.rename(away)
    try:
        status, _, err = command("evaluate", run, "--data", away, *WORDS)
        assert status == 2 and "principal components" in err[-1] and str(classes) in err[-1], err
    finally:
        away.rename(classes)


def test_a_file_that_names_its_teacher_is_evaluated(classes, command, tmp_path):
    info = ModelInfo(step=2, teachers=[TEACHER])
    write_safetensors(tmp_path / "whole.safetensors", make_model(), info)
    write_safetensors(tmp_path / "other.safetensors", make_model(class_dim=9), info)
    words = ["--data", classes, "--metrics", "none", "--out", tmp_path / "out", *WORDS[-2:]]
    status, _, err = command("evaluate", tmp_path / "whole.safetensors", *words)
    assert status == 0, err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    expected = losses_by_time(make_model(), HeldOut(classes, 48, chosen(classes)), bins=10)
    for name, values in expected.items():
        assert list(report["held_out"][name].values()) == pytest.approx(values, rel=1e-5)
    status, _, err = command("evaluate", tmp_path / "other.safetensors", *words)
    assert status == 2 and "9 principal components" in err[-1], err


def test_guidance_of_a_class_token_that_is_not_there(data, command, tmp_path):
    train_on(data, tmp_path / "run", training__max_steps=1)
    status, _, err = command("evaluate", tmp_path / "run", "--data", data, *WORDS, "--cls-cfg-scale", 2)
    assert status == 2 and "the model has no class token" in err[-1], err
