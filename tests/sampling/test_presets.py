"""`--preset paper` and `--labels`: the published settings, and which labels a set gets."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from maskalign.checkpoints import ModelInfo
from maskalign.errors import UsageError
from maskalign.evaluation.drawn import DrawnPictures
from maskalign.sampling.command import sample
from maskalign.sampling.sets import draw_set
from maskalign.sampling.settings import Sampling, with_preset


@pytest.mark.parametrize(
    "class_token, aligned, paper, scales, interval",
    [
        (True, True, "reg", (2.3, 2.3), (0.0, 0.85)),
        (False, True, "repa", (1.8, None), (0.0, 0.7)),
        (False, False, "sit", (1.5, None), (0.0, 1.0)),
    ],
)
def test_the_published_settings(class_token, aligned, paper, scales, interval):
    settings, name = with_preset(Sampling(seed=3), "paper", set(), class_token=class_token, aligned=aligned)
    assert name == paper and (settings.sampler, settings.steps, settings.seed) == ("sde", 250, 3)
    assert (settings.cfg_scale, settings.cls_cfg_scale) == scales and settings.cfg_interval == interval


def test_what_is_given_is_kept():
    given = Sampling(steps=4, cfg_scale=1.0)
    settings, _ = with_preset(given, "paper", {"steps", "cfg_scale"}, class_token=True, aligned=True)
    assert settings.steps == 4 and settings.cfg_scale == 1.0 and settings.sampler == "sde"
    assert with_preset(given, None, set(), class_token=True, aligned=True) == (given, None)


@pytest.mark.parametrize("labels, classes", [(None, None), ("balanced", None), ("uniform", [1, 3]), (None, [1, 3])])
def test_labels_of_a_set(labels, classes, tmp_path, monkeypatch):
    """Balanced sets have every class equally often; uniform ones depend on the index alone and have all of them."""
    import maskalign.sampling.sets as module

    seen = {}

    def generate(network, labels, settings, indices):
        seen.update(zip(indices, labels.tolist(), strict=True))
        return torch.zeros(len(labels), 3, 4, 4)

    monkeypatch.setattr(module, "generate", generate)
    network = SimpleNamespace(input_size=4, in_channels=3, num_classes=5, device=torch.device("cpu"), precision="fp32")
    ranks = SimpleNamespace(rank=0, world_size=1, barrier=lambda: None)
    count = 200
    draw_set(network, count, tmp_path, Sampling(), ModelInfo("m", 1), ranks, classes=classes, labels=labels)
    there = classes or list(range(5))
    found = [list(seen.values()).count(label) for label in there]
    assert sorted(seen) == list(range(count)) and sum(found) == count and min(found) > 0
    balanced = labels == "balanced" or (labels is None and classes is not None)
    assert (len(set(found)) == 1) == balanced, found


def test_labels_without_a_set_are_refused(tmp_path):
    with pytest.raises(UsageError, match="--labels"):
        sample(tmp_path, tmp_path / "out", labels="uniform")


def test_labels_of_an_evaluation():
    network = SimpleNamespace(input_size=4, in_channels=3)
    reference = torch.tensor([0, 0, 0, 7])
    like = DrawnPictures(network, 8, Sampling())
    like.choose_labels(reference)
    assert like.labels.tolist() == [0, 0, 0, 7] * 2
    uniform = DrawnPictures(network, 400, Sampling(), label_choice="uniform")
    uniform.choose_labels(reference)
    assert 120 < uniform.labels.eq(7).sum() < 280 and set(uniform.labels.tolist()) == {0, 7}
    again = DrawnPictures(network, 10, Sampling(), label_choice="uniform")
    again.choose_labels(reference)
    assert again.labels.tolist() == uniform.labels[:10].tolist(), "an image's label depends on its number alone"
    assert "cfg_scale" in asdict(uniform.settings)
