"""What is kept of a model beside its weights, as checkpoints of this and of earlier versions have it."""

import json

import pytest

from maskalign.checkpoints import ModelInfo, ModelSpec

# The entry `facts` of a state.json.
FACTS = {
    "input_size": 32,
    "in_channels": 4,
    "num_classes": 2,
    "teacher_dims": [768],
    "class_dim": 64,
    "position_grid": 8,
    "teachers": ["dinov2-b"],
    "class_names": ["ant", "bee"],
    "latent": {"scale": 0.18215, "bias": 0.0, "shape": [8, 32, 32]},
    "data": {"samples": 10, "builds": [None], "features": {}, "class_token": None},
}


def test_the_form_in_a_checkpoint_stays():
    spec = ModelSpec.from_dict(json.loads(json.dumps(FACTS)))
    assert (spec.input_size, spec.teacher_dims, spec.class_dim, spec.latent["scale"]) == (32, [768], 64, 0.18215)
    assert json.dumps(spec.to_dict()) == json.dumps(FACTS)


@pytest.mark.parametrize("lacking", ["class_dim", "position_grid", "teachers", "class_names", "latent", "data"])
def test_checkpoints_of_other_versions_are_read(lacking):
    older = {key: value for key, value in FACTS.items() if key != lacking}
    assert ModelSpec.from_dict(older).to_dict() == {**FACTS, lacking: None}
    assert ModelSpec.from_dict({**FACTS, "more": 1}) == ModelSpec.from_dict(FACTS)


def test_a_label_has_the_step_where_it_is_known():
    assert ModelInfo("net").label == "net" and ModelInfo("net", 0).label == "net, step 0"


def test_the_vae_that_was_named_comes_before_the_data_sets():
    latent = {"scale": 1.0, "bias": 0.0, "name": "of the data"}
    assert ModelInfo(vae="named", latent=latent).vae_name == "named"
    assert ModelInfo(latent=latent).vae_name == "of the data"
    assert ModelInfo(latent={"scale": 1.0, "bias": 0.0}).vae_name is ModelInfo().vae_name is None
