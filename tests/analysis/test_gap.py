"""Shares and stability gap of whole runs: with and without a class token, side by side, against counting and layers."""

import csv

import numpy as np
import pytest
import torch

from maskalign.analysis.command import analyze
from maskalign.analysis.gap import GapLosses, measure_gap
from maskalign.analysis.images import Images
from maskalign.analysis.measure import FULL, measure_tokens
from maskalign.analysis.settings import AnalysisSettings
from maskalign.analysis.subjects import find_checkpoints, load_subject
from maskalign.analysis.tables import gap_rows, position_rows, share_rows
from maskalign.errors import UsageError
from maskalign.evaluation.gap import keyed_subsets
from maskalign.models.routing import gather_tokens

SETTINGS = dict(images=10, times=(0.2, 0.8), draws=2, batch_size=4, permutations=30, subsets=3)


@pytest.fixture(scope="module")
def class_data(make_data, tmp_path_factory):
    """The images and features of `data_set`, and a class token for each."""
    return make_data(tmp_path_factory.mktemp("classes") / "data", class_token=True)


REG = dict(model__class_token="true", model__mixer="attention", training__max_steps=2)


@pytest.fixture(scope="module")
def class_run(class_data, make_run, tmp_path_factory):
    """The paper's model: class token, two mixing layers, trained on half of the patches."""
    return make_run(class_data, tmp_path_factory.mktemp("classes") / "maskalign", **REG)


def load(run, data, **settings):
    subject = load_subject(find_checkpoints([run])[-1])
    settings = AnalysisSettings(**{**SETTINGS, **settings})
    return subject, Images(data, subject, settings.images, batch_size=4), settings


def test_images_bring_their_class_tokens(class_run, class_data):
    subject, images, settings = load(class_run, class_data)
    assert images.class_tokens.shape == (10, 6) and images.features[0].shape == (10, 17, 6)
    assert images.features[0].dtype == torch.int8
    # Row 0 is the class token, whose length does not count.
    cosine = torch.cosine_similarity(images.features[0][:, 0].float(), images.class_tokens, dim=-1)
    assert cosine.min() > 0.999
    rows = slice(4, 8)
    draws = images.draws(subject, None, 0, rows, 0)
    batch = images.noised(subject, draws, rows, 0.3)
    expected = 0.7 * images.class_tokens[rows] + 0.3 * draws.class_noise
    torch.testing.assert_close(batch.class_token, expected)


def test_the_gap_is_that_of_the_layers(class_run, class_data, seed):
    """Mixing layers on all tokens, then the class token and twelve of sixteen patches through the blocks."""
    subject, images, settings = load(class_run, class_data, seed=seed)
    found = measure_gap(subject, images, settings)
    assert found.full.shape == (2, 10) and found.subset.shape == (2, 3, 10)
    model, rows = subject.model, slice(0, 10)
    batch = images.noised(subject, images.draws(subject, None, 0, rows, seed), rows, 0.8)
    with torch.no_grad():
        tokens = model.x_embedder(batch.x_t) + model.pos_embed
        first = model.class_embedder.norm(model.class_embedder.proj(batch.class_token))
        tokens = torch.cat([first[:, None], tokens], dim=1)
        c = model.t_embedder(batch.t) + model.y_embedder(batch.labels)
        for layer in model.mixer.layers:
            tokens = layer(tokens, c)
        everything = torch.arange(17).expand(10, -1)
        for number in (None, 0, 2):
            kept = everything
            if number is not None:
                subset = keyed_subsets(f"gap/{seed}/{number}", range(10), 16, 12)
                kept = torch.cat([torch.zeros(10, 1, dtype=torch.long), 1 + subset], dim=1)
            h = gather_tokens(tokens, kept)
            for block in model.blocks[:2]:
                h = block(h, c)
            wanted = gather_tokens(batch.teachers[0].float(), kept)
            losses = -torch.cosine_similarity(model.projectors[0](h), wanted, dim=-1).mean(dim=1)
            ours = found.full[1] if number is None else found.subset[1, number]
            np.testing.assert_allclose(ours, losses.numpy(), rtol=1e-4, atol=1e-6)
    assert found.gaps(1).shape == found.gaps(matched=True).shape == (3, 10)
    assert found.gaps(matched=True).std() < found.gaps().std()
    other = measure_gap(subject, images, AnalysisSettings(**{**SETTINGS, "batch_size": 3, "seed": seed}))
    np.testing.assert_allclose(other.subset, found.subset, rtol=1e-4, atol=1e-6)


def test_rows_of_the_gap_are_means_and_errors(full_run, data_set, seed):
    subject, _, settings = load(full_run, data_set)
    rng = np.random.default_rng(seed)
    matched = rng.normal(0.05, 0.01, (2, 3, 9))
    losses = GapLosses(rng.normal(-0.5, 0.1, (2, 9)), rng.normal(-0.45, 0.1, (2, 3, 9)), matched)
    rows = gap_rows(subject, losses, 12, settings)
    assert [row["time"] for row in rows] == ["", 0.2, 0.8]
    gaps = [losses.subset[:, :, image].mean() - losses.full[:, image].mean() for image in range(9)]
    by_subset = [losses.subset[:, number].mean() - losses.full.mean() for number in range(3)]
    assert rows[0]["gap"] == pytest.approx(np.mean(gaps)) == pytest.approx(np.mean(by_subset))
    assert rows[0]["standard_error"] == pytest.approx(np.std(gaps, ddof=1) / 3)
    assert rows[0]["subset_deviation"] == pytest.approx(np.std(by_subset, ddof=1))
    assert rows[0]["gap"] == pytest.approx(rows[0]["subset_loss"] - rows[0]["full_loss"])
    assert rows[0]["matched_gap"] == pytest.approx(matched.mean())
    assert rows[0]["matched_error"] == pytest.approx(matched.mean(axis=(0, 1)).std(ddof=1) / 3)
    assert rows[2]["gap"] == pytest.approx(losses.subset[1].mean() - losses.full[1].mean())
    assert gap_rows(subject, None, 12, settings) == []


def test_shares_are_counted_over_patches_alone(class_run, class_data):
    """The two largest of sixteen patches, whatever the class token's own gradient is."""
    subject, images, settings = load(class_run, class_data)
    found = measure_tokens(subject, images, settings)
    norms = found.norms[FULL]
    assert norms.shape == (2, 2, 10, 16)
    counts = np.zeros((2, 16))
    for time in range(2):
        for image in norms[time].reshape(-1, 16):
            counts[time, np.argsort(-image)[:2]] += 1
    rows = share_rows(subject, found, settings)
    for row, own, total in zip(rows, (counts.sum(axis=0), *counts), (40, 20, 20), strict=True):
        assert row["chance"] == 2 / 16 and row["observations"] == total
        assert row["largest"] == own.max() / total and row["smallest"] == own.min() / total
        assert row["ratio"] == pytest.approx(own.max() / max(own.min(), 1)) and row["at_least"] == (own.min() == 0)
    shares = [
        r["top_frequency"] for r in position_rows(subject, found, settings) if (r["mode"], r["time"]) == (FULL, "")
    ]
    np.testing.assert_allclose(shares, counts.sum(axis=0) / 40)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_runs_with_and_without_a_class_token_side_by_side(class_run, full_run, class_data, tmp_path):
    settings = AnalysisSettings(**SETTINGS)
    outcome = analyze(
        [full_run, class_run], class_data, tmp_path / "out", settings=settings, progress=False
    ).read_text()
    gaps = rows_of(tmp_path / "out" / "gap.csv")
    assert {(row["run"], row["step"]) for row in gaps} == {("full", "2"), ("full", "4"), ("maskalign", "2")}
    assert len(gaps) == 3 * 3 and {row["kept"] for row in gaps} == {"12"}
    # The run without a class token is measured as in a call of its own.
    analyze([full_run], class_data, tmp_path / "alone", settings=settings, progress=False)
    assert rows_of(tmp_path / "alone" / "gap.csv") == [row for row in gaps if row["run"] == "full"]
    shares = rows_of(tmp_path / "out" / "shares.csv")
    assert [row for row in shares if row["run"] == "full"] == rows_of(tmp_path / "alone" / "shares.csv")
    whole = next(row for row in gaps if (row["run"], row["time"]) == ("maskalign", ""))
    text = f"| {float(whole['full_loss']):+.4f} | {float(whole['gap']):+.5f} ± {float(whole['standard_error']):.5f} |"
    assert text in outcome and "the class token (where there is one) and 12 of 16 patches" in outcome
    assert "| maskalign | 2, 2 |" in outcome
    for name in ("shares.png", "gap.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


def test_a_class_token_of_principal_components(class_data, make_run, tmp_path):
    run = make_run(class_data, tmp_path / "projected", **REG, model__class_token_dim=3)
    subject, images, settings = load(run, class_data)
    assert subject.model.class_dim == 3 and images.class_tokens.shape == (10, 3)
    assert images.features[0].shape == (10, 17, 6)  # what is aligned is the class token itself
    assert np.isfinite(measure_gap(subject, images, settings).subset).all()


def test_class_tokens_of_other_statistics_are_computed_anew(class_run, class_data, make_data, tmp_path, monkeypatch):
    """Averages of rows are standardized with the statistics of the training, whichever data set is looked at."""
    from maskalign.data.format.manifest import Manifest
    from maskalign.teachers import features

    other = make_data(tmp_path / "other", class_token=True)
    manifest = Manifest.load(str(other))
    manifest.teachers["efficientnet-lite0"]["class_token"]["std"] = [2.0] * 6
    manifest.save(other)
    asked = []

    def load_teacher_like(name, entry, **own):
        asked.append(entry["class_token"]["std"])
        raise UsageError("stop here")

    monkeypatch.setattr(features, "load_teacher_like", load_teacher_like)
    with pytest.raises(UsageError, match="stop here"):
        load(class_run, other)
    assert asked == [[1.0] * 6]
    load(class_run, class_data)
    assert len(asked) == 1


def test_data_without_class_tokens_is_refused(class_run, data_set):
    with pytest.raises(UsageError, match="--class-token only"):
        load(class_run, data_set)


def test_a_projector_that_needs_the_grid_has_no_gap(data_set, make_run, tmp_path):
    run = make_run(data_set, tmp_path / "conv", training__max_steps=1, method__route="none", model__projector="conv")
    outcome = analyze([run], data_set, tmp_path / "out", settings=AnalysisSettings(**SETTINGS), progress=False)
    assert "no stability gap" in outcome.read_text() and not (tmp_path / "out" / "gap.png").exists()
    assert rows_of(tmp_path / "out" / "gap.csv") == []


def test_a_run_whose_alignment_has_ended_is_measured(data_set, make_run, tmp_path):
    ended = "{kind: step, start: 0.5, end: 0.0, begin: 0.4}"
    run = make_run(data_set, tmp_path / "ended", training__max_steps=2, method__align_weight=ended)
    subject, images, settings = load(run, data_set)
    assert np.isfinite(measure_gap(subject, images, settings).full).all()


def test_wrong_mask_ratios(full_run, data_set):
    for settings, words in ((dict(mask_ratio=1.0), "--mask-ratio"), (dict(subsets=1), "--subsets")):
        with pytest.raises(UsageError, match=words):
            AnalysisSettings(**settings)
    subject, images, settings = load(full_run, data_set, mask_ratio=0.01)
    with pytest.raises(UsageError, match="drops none"):
        measure_gap(subject, images, settings)
