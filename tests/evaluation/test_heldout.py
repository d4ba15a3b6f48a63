"""Held-out losses by time: against the definition, the same for any batches, and from the right features."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from maskalign.data.format.manifest import Manifest
from maskalign.evaluation.heldout import HeldOut, TeacherTokens, bin_names, choose_teachers, losses_by_time
from maskalign.models import SiT
from tests.tiny_runs import TEACHER, write_data_set


class Fixed(nn.Module):
    """A model with a velocity of zero and the given tokens."""

    grid = (4, 4)

    def __init__(self, tokens=None):
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))
        self.tokens, self.seen = tokens, []

    def forward(self, x, t, labels):
        self.seen.append((x, t, labels))
        return SimpleNamespace(velocity=torch.zeros_like(x), aligned=[] if self.tokens is None else [self.tokens(x)])


def make_model(seed=0, **settings):
    sizes = dict(input_size=16, patch_size=4, depth=2, width=16, heads=2, teacher_dims=(6,), align_depth=1,
                 projector_dim=8, mixer_hidden=4, num_classes=3, in_channels=3)  # fmt: skip
    model = SiT(**{**sizes, **settings})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def cached(name=TEACHER):
    return TeacherTokens(name, None, (4, 4))


def test_the_loss_of_a_model_that_predicts_nothing(data):
    """It is the mean of (eps - x)^2: near 1 + mean x^2 in every bin, and each image is met once in each."""
    model = Fixed()
    held_out = HeldOut(data, 40, batch_size=16)
    found = losses_by_time(model, held_out, bins=4)
    clean = torch.cat([x for _, x, _, _ in held_out.batches()])
    expected = 1 + float(clean.square().mean())
    assert set(found) == {"velocity_loss"} and len(clean) == 40
    assert found["velocity_loss"] == pytest.approx([expected] * 4, rel=0.03)
    for index in range(4):
        times = torch.cat([t for x, t, _ in model.seen[index::4]])
        assert len(times) == 40 and index / 4 < times.min() and times.max() < (index + 1) / 4
        assert times.std() > 0.04  # spread over the bin: a uniform draw of width 1/4 has 0.072
    labels = [labels for _, _, labels in model.seen]
    assert set(torch.cat(labels).tolist()) == {0, 1, 2}


def test_the_loss_is_the_definition(data):
    model = make_model()
    held_out = HeldOut(data, 6, [cached()], batch_size=6)
    found = losses_by_time(model, held_out, bins=2, path="cosine")
    probe = Fixed()
    losses_by_time(probe, held_out, bins=2, path="cosine")
    ((_, x, labels, ((tokens, grid),)),) = held_out.batches()
    for index, (noised, t, _) in enumerate(probe.seen):
        angle = (t * np.pi / 2).view(-1, 1, 1, 1)
        noise = (noised - angle.cos() * x) / angle.sin()
        velocity = np.pi / 2 * (angle.cos() * noise - angle.sin() * x)
        out = model(noised, t, labels)
        loss = float((out.velocity.detach() - velocity).square().mean())
        assert found["velocity_loss"][index] == pytest.approx(loss, rel=1e-4)
        cosine = torch.cosine_similarity(out.aligned[0], tokens.float(), dim=-1).mean()
        assert found["cosine"][index] == pytest.approx(float(cosine), abs=1e-5)


def test_the_result_depends_on_neither_batches_nor_chance(data):
    model = make_model()
    results = []
    for batch_size in (4, 7, 40):
        torch.manual_seed(batch_size)
        held_out = HeldOut(data, 20, [cached()], batch_size=batch_size)
        results.append(losses_by_time(model.train(), held_out, bins=3))
        assert model.training  # as it was
    for found in results[1:]:
        for key, values in results[0].items():
            assert found[key] == pytest.approx(values, rel=1e-5, abs=1e-6)


def test_cosines_are_a_mean_over_teachers(data):
    """A model that gives back what one teacher says has cosine 1 with it, -1 with its opposite, 0 on average."""
    held_out = HeldOut(data, 10, [cached()], batch_size=10)
    ((_, _, _, ((tokens, _),)),) = held_out.batches()
    model = Fixed(lambda x: 2.0 * tokens.float())
    assert losses_by_time(model, held_out, bins=2)["cosine"] == pytest.approx([1, 1], abs=1e-6)
    held_out.teachers.append(cached())
    model.forward = lambda x, t, labels: SimpleNamespace(
        velocity=torch.zeros_like(x), aligned=[tokens.float(), -tokens.float()]
    )
    assert losses_by_time(model, held_out, bins=2)["cosine"] == pytest.approx([0, 0], abs=1e-6)


def test_latents_are_drawn_from_their_posterior(tmp_path):
    write_data_set(tmp_path / "latents", samples=24, latent=True)
    held_out = HeldOut(tmp_path / "latents", 20, batch_size=8)
    first, second = ([(x, labels) for _, x, labels, _ in held_out.batches()] for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))  # keyed, not random
    assert [tuple(x.shape) for x, _ in first] == [(8, 4, 8, 8), (8, 4, 8, 8), (4, 4, 8, 8)]
    model = make_model(input_size=8, in_channels=4, patch_size=2, teacher_dims=())
    assert all(np.isfinite(losses_by_time(model, held_out, bins=2)["velocity_loss"]))


def test_teachers_are_read_from_the_shards_or_run(data):
    manifest = Manifest.load(data)
    assert choose_teachers([TEACHER], manifest, manifest) == [TeacherTokens(TEACHER, None, (4, 4))]
    assert choose_teachers([TEACHER], None, manifest) == [TeacherTokens(TEACHER, None, (4, 4))]
    # Trained on features normalized in another way: the cached ones are not what the model was aligned with.
    other = Manifest.load(data)
    other.teachers = {TEACHER: other.teachers[TEACHER] | {"normalize": "spatial"}}
    (chosen,) = choose_teachers([TEACHER], other, manifest)
    assert chosen.network.normalize == "spatial" and chosen.grid == (4, 4)
    none = Manifest.load(data)
    none.teachers = {}
    (chosen,) = choose_teachers([TEACHER], none, none, normalize="spatial")
    assert chosen.network.normalize == "spatial" and chosen.grid == (8, 8)
    ((_, x, _, ((tokens, grid),)),) = HeldOut(data, 3, [chosen], batch_size=3).batches()
    assert tokens.shape == (3, 64, 320) and grid == (8, 8) and x.shape == (3, 3, 16, 16)


def test_names_of_bins():
    assert bin_names(4) == ["0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00"]
    assert bin_names(10)[:2] == ["0.0-0.1", "0.1-0.2"] and bin_names(1) == ["0.0-1.0"]
    assert len(set(bin_names(1000))) == 1000
