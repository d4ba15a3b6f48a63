"""A real, small model that draws something: a fresh one predicts nothing, as its last layers are zero."""

import pytest
import torch

from maskalign.models import SiT


@pytest.fixture
def random_model(seed):
    """Function from settings of a SiT, over those of one for 8 px pictures of 4 classes, to one with random weights."""

    def make(**settings):
        small = dict(input_size=8, in_channels=3, num_classes=4, width=16, heads=2)
        small |= dict(align_depth=1, teacher_dims=(), mixer="none")
        model = SiT(**{**small, **settings})
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        return model

    return make
