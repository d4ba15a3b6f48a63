"""Whole measurements: a planted position is found, batching and devices of work change nothing, draws are shared."""

import numpy as np
import pytest
import torch

from maskalign.analysis.agreement import FULL_PAIR, IMAGE_PAIR, MASKED_PAIR, measure_agreement
from maskalign.analysis.images import Images
from maskalign.analysis.measure import FULL, MASKED, SUBSET, measure_tokens
from maskalign.analysis.settings import AnalysisSettings
from maskalign.analysis.stability import top_tokens
from maskalign.analysis.subjects import find_checkpoints, load_subject
from maskalign.analysis.tables import concentration_row, position_rows, stability_rows

SETTINGS = dict(images=20, times=(0.2, 0.8), draws=2, batch_size=8, permutations=100)


def load(run, data, **settings):
    """(subject, images, settings) of a run's last checkpoint."""
    subject = load_subject(find_checkpoints([run])[-1])
    settings = AnalysisSettings(**{**SETTINGS, **settings})
    return subject, Images(data, subject, settings.images, batch_size=8), settings


def test_every_way_to_align_is_measured_where_it_was_trained(masked_run, full_run, data_set):
    subject, images, settings = load(masked_run, data_set)
    found = measure_tokens(subject, images, settings)
    assert list(found.norms) == [FULL, MASKED, SUBSET]
    assert found.norms[FULL].shape == (2, 2, 20, 16) and (found.norms[FULL] > 0).all()
    for mode in (MASKED, SUBSET):
        assert (np.isfinite(found.norms[mode]).sum(axis=-1) == 8).all()
    # The same subsets under both, and at all times; another one in another draw.
    kept = np.isfinite(found.norms[MASKED])
    assert (kept == np.isfinite(found.norms[SUBSET])).all() and (kept[0] == kept[1]).all()
    assert (kept[:, 0] != kept[:, 1]).any(axis=-1).mean() > 0.9
    # A pointwise projector: what else is aligned does not matter to a token, but what else is seen does.
    both = np.isfinite(found.norms[SUBSET])
    assert (found.norms[SUBSET][both] == found.norms[FULL][both]).all()
    assert not np.allclose(found.norms[MASKED][both], found.norms[FULL][both])
    assert list(measure_tokens(*load(full_run, data_set)).norms) == [FULL, SUBSET]


def test_norms_do_not_depend_on_batches(masked_run, data_set):
    subject, images, settings = load(masked_run, data_set)
    whole = measure_tokens(subject, images, settings)
    parts = measure_tokens(subject, images, AnalysisSettings(**{**SETTINGS, "batch_size": 3}))
    for mode, norms in whole.norms.items():
        np.testing.assert_allclose(parts.norms[mode], norms, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(parts.cosines[mode], whole.cosines[mode], rtol=1e-4, atol=1e-6)


def test_a_planted_position_is_found(full_run, data_set):
    """A student that says the same at every token, a teacher that agrees everywhere but at token 6."""
    subject, images, settings = load(full_run, data_set)
    model = subject.model
    with torch.no_grad():
        model.x_embedder.proj.weight.zero_()
        model.pos_embed.zero_()
        for block in model.blocks:
            block.adaLN_modulation[1].weight.zero_()
            block.adaLN_modulation[1].bias.zero_()
        model.y_embedder.embedding_table.weight.zero_()
        model.t_embedder.mlp[2].weight.zero_()
        said = model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long)).aligned[0][0, 0]
    teacher = said.repeat(images.count, 16, 1)
    teacher[:, 6] = torch.randn(images.count, len(said), generator=torch.Generator().manual_seed(0))
    images.features = [teacher]
    found = measure_tokens(subject, images, settings)
    norms = found.norms[FULL]
    assert (norms[..., 6] > 100 * np.delete(norms, 6, axis=-1).max(axis=-1)).all()
    assert (top_tokens(norms, 0.05).argmax(axis=-1) == 6).all()
    settings = AnalysisSettings(**SETTINGS, top=0.05)
    row = concentration_row(subject, FULL, norms, settings)
    assert row["most_frequent"] == 1 and row["taken"] == 1 and row["taken"] > row["taken_high"]
    rows = position_rows(subject, found, settings)
    best = max((row for row in rows if row["mode"] == FULL and row["time"] == ""), key=lambda row: row["norm"])
    assert (best["row"], best["column"]) == (1, 2) and best["top_frequency"] == 1 and best["cosine"] < 0.99
    stable = [row for row in stability_rows(subject, found, settings) if row["mode"] == FULL]
    assert all(row["overlap"] == 1 for row in stable if row["between"] != "ways")


def test_positions_are_means_over_what_was_aligned(masked_run, data_set):
    subject, images, settings = load(masked_run, data_set)
    found = measure_tokens(subject, images, settings)
    norms = found.norms[MASKED][1]
    for row in position_rows(subject, found, settings):
        if (row["mode"], row["time"], row["row"], row["column"]) == (MASKED, 0.8, 2, 3):
            seen = norms[..., 11][np.isfinite(norms[..., 11])]
            assert row["norm"] == pytest.approx(seen.mean(), rel=1e-5)
            largest = [np.nanargmax(one) == 11 for one in norms.reshape(-1, 16)]
            assert row["top_frequency"] == pytest.approx(sum(largest) / len(seen))
            return
    raise AssertionError("the row is missing")


def test_trunk_agreement(masked_run, full_run, data_set):
    subject, images, settings = load(masked_run, data_set)
    found = measure_agreement(subject, images, settings)
    assert set(found[MASKED_PAIR]) == {"all", "embedding", "mixer", "block 1", "block 2"}
    assert len(found[MASKED_PAIR]["all"]) == 2 and len(found[IMAGE_PAIR]["all"]) == 1  # two groups of 8 of 20 images
    assert all(-1 <= cosine <= 1 for places in found.values() for values in places.values() for cosine in values)
    # Subsets that are nearly everything pull the same way; half of the tokens less so.
    subject, images, settings = load(full_run, data_set)
    subject.config.method.keep_multiple = 1
    assert MASKED_PAIR not in measure_agreement(subject, images, settings)
    agreements = [
        measure_agreement(subject, images, AnalysisSettings(**SETTINGS, keep_ratio=keep))[FULL_PAIR]["all"][0]
        for keep in (15 / 16, 0.25)
    ]
    assert agreements[0] > 0.9 > agreements[1]
