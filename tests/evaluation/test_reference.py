"""Cached references: used for exactly what they were computed from."""

import logging

import numpy as np
import pytest
import torch

from maskalign.errors import UsageError
from maskalign.evaluation.pictures import PictureDataSet
from maskalign.evaluation.reference import load_reference
from tests.tiny_runs import write_data_set


class MeanColor:
    """Features that count how many pictures they have seen."""

    name, dim = "mean-color", 3

    def __init__(self, weights="a"):
        self.weights, self.seen = weights, 0

    def fingerprint(self):
        return self.weights

    def __call__(self, pictures):
        self.seen += len(pictures)
        return pictures.float().mean(dim=(2, 3))


def test_a_reference_is_computed_once(data, cache):
    first, second = MeanColor(), MeanColor()
    done = []
    made = load_reference(PictureDataSet(data, 40), first, batch_size=16, on_images=done.append)
    again = load_reference(PictureDataSet(data, 40), second, batch_size=8)
    assert (first.seen, second.seen, sum(done)) == (40, 0, 40) and (made.cached, again.cached) == (False, True)
    assert np.array_equal(made.features, again.features) and np.array_equal(made.labels, again.labels)
    assert made.features.shape == (40, 3) and made.labels.shape == (40,) and len(list(cache.iterdir())) == 1


def test_a_stale_reference_is_never_used(data, tmp_path):
    def seen(path=data, count=40, weights="a"):
        features = MeanColor(weights)
        load_reference(PictureDataSet(path, count), features)
        return features.seen

    assert seen() == 40 and seen() == 0
    assert seen(count=39) == 39 and seen(count=0) == 48 and seen(weights="b") == 40
    # A data set of the same name, place and shape with other pictures.
    write_data_set(tmp_path / "again" / "data")
    assert seen(tmp_path / "again" / "data") == 0  # the same pictures: it is not the path that counts
    write_data_set(tmp_path / "other" / "data", seed=1)
    assert seen(tmp_path / "other" / "data") == 40


@pytest.mark.parametrize("damage", ["cut", "text", "shape", "nan"])
def test_a_damaged_reference_is_computed_again(damage, data, cache, caplog):
    truth = load_reference(PictureDataSet(data, 16), MeanColor())
    (path,) = cache.iterdir()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "text":
        path.write_text("nothing")
    else:
        features = np.full((16, 3), np.nan) if damage == "nan" else np.zeros((16, 2))
        np.savez(path, features=features, labels=np.zeros(16, dtype=np.int64))
    with caplog.at_level(logging.WARNING):
        again = load_reference(PictureDataSet(data, 16), MeanColor())
    assert not again.cached and np.array_equal(again.features, truth.features) and "damaged" in caplog.text
    assert load_reference(PictureDataSet(data, 16), MeanColor()).cached


def test_a_folder_that_cannot_be_written_costs_only_time(data, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MASKALIGN_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        found = load_reference(PictureDataSet(data, 16), MeanColor())
    assert len(found.features) == 16 and "not kept" in caplog.text


def test_old_references_make_room(data, cache, monkeypatch):
    monkeypatch.setattr("maskalign.evaluation.reference.KEPT", 2)
    for count in (10, 11, 12):
        load_reference(PictureDataSet(data, count), MeanColor())
    assert sorted(path.name.split("-")[2] for path in cache.iterdir()) == ["11", "12"]


def test_fingerprints_follow_the_weights():
    from maskalign.evaluation.features import Features, module_digest

    layers = [torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    assert module_digest(layers[0], "a") == module_digest(layers[1], "a") != module_digest(layers[1], "b")
    with torch.no_grad():
        layers[1].bias[2] += 1e-6
    assert module_digest(layers[0], "a") != module_digest(layers[1], "a")
    for layer in layers:
        layer.dim = 3
    one, two, three = Features("t", layers[0]), Features("t", layers[1]), Features("u", layers[0])
    assert len({features.fingerprint() for features in (one, two, three)}) == 3


def test_classes_without_pictures_are_one_line(data, cache):
    """A class may be in the manifest and in no sample."""
    with pytest.raises(UsageError, match="holds no pictures of these classes"):
        load_reference(PictureDataSet(data, 0, [7]), MeanColor())
