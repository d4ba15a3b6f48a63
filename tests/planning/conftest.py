"""Small runs to plan, and the same ones to measure."""

import pytest

from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import parse_config


@pytest.fixture
def settings():
    """Config of a small model; words as on the command line are added."""

    def make(*words):
        base = "--model.depth 4 --model.width 64 --model.heads 4 --model.patch_size 2 --model.projector_dim 128"
        base += " --method.align_depth 2 --training.batch_size 8 --training.precision fp32 --data.path none"
        return parse_config([*base.split(), *words])

    return make


@pytest.fixture
def spec():
    """16 x 16 latents with one cached teacher of 48 numbers a token."""
    return ModelSpec(16, 4, 10, teacher_dims=[48], latent={"scale": 1.0, "bias": 0.0})
