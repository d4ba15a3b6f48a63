"""Pictures drawn for an evaluation: those of the sampler, whatever the batches, and through the decoder of latents."""

import pytest
import torch

from maskalign.errors import RunError, UsageError
from maskalign.evaluation.drawn import DrawnPictures, labels_like
from maskalign.sampling import Sampling, generate, to_uint8
from tests.evaluation.test_heldout import make_model


def joined(drawn, size):
    return torch.cat(list(drawn.batches(size)))


def test_they_are_the_samplers_pictures_in_any_batches():
    model, settings = make_model(), Sampling(steps=2, seed=3)
    drawn = DrawnPictures(model, 7, settings)
    drawn.labels, seen = torch.arange(7) % 3, []
    drawn.on_images = seen.append
    found = joined(drawn, 3)
    assert drawn.size == (16, 16) and sum(seen) == pytest.approx(7)
    expected = to_uint8(generate(model, drawn.labels, settings)).permute(0, 3, 1, 2)
    for pictures in (found, joined(drawn, 7)):
        assert pictures.shape == (7, 3, 16, 16) and pictures.dtype == torch.uint8
        assert (pictures.int() - expected.int()).abs().max() <= 1  # matmuls of other sizes may round differently


def test_latents_go_through_their_decoder():
    model = make_model(in_channels=4)

    def decoder(latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=2)

    drawn = DrawnPictures(model, 2, Sampling(steps=1), decoder)
    drawn.labels = torch.tensor([0, 1])
    assert drawn.size == (32, 32) and joined(drawn, 2).shape == (2, 3, 32, 32)
    with pytest.raises(UsageError, match="draws 4 channels"):
        DrawnPictures(model, 2, Sampling(steps=1))


def test_numbers_that_are_not_finite_are_no_pictures():
    model = make_model()
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(torch.nan)
    drawn = DrawnPictures(model, 2, Sampling(steps=1))
    drawn.labels = torch.tensor([0, 1])
    with pytest.raises(RunError, match="non-finite"):
        joined(drawn, 2)


def test_labels_follow_the_real_pictures():
    assert labels_like(torch.tensor([2, 0, 1]), 7).tolist() == [2, 0, 1, 2, 0, 1, 2]
    assert labels_like(torch.tensor([2, 0, 1]), 2).tolist() == [2, 0]
