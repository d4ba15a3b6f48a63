"""TFLOP of a training step of a recipe in one of its phases."""

import torch

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import as_schedule
from maskalign.models.flops import step_flops


def step_tflop(config, facts, manifest, phase):
    """TFLOP of forward and backward of one step over the whole batch, counted as in `maskalign.models.flops`.

    Args:
        config: `Config` of the recipe.
        facts: `config.DataFacts`.
        manifest: `Manifest` of the training data, for the teachers' widths.
        phase: `clock.Phase`.
    """
    weight = as_schedule(config.method.align_weight)
    ever = max(weight.ends) > 0
    names = [name for name, _ in facts.teachers] or config.teacher.names
    dims = [manifest.teachers[name]["dim"] for name in names] if ever and phase.aligned else []
    class_dim = None
    if config.model.class_token:
        class_dim = config.model.class_token_dim or manifest.teachers[names[0]]["class_token"]["dim"]
    spec = ModelSpec(facts.input_size, facts.in_channels, facts.num_classes, dims, class_dim)
    with torch.device("meta"):
        model = build_model(config, spec)
    return config.training.batch_size * step_flops(model, phase.keep) / 1e12
