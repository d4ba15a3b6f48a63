"""TFLOP of a training step of a recipe in one of its phases."""

import torch

from maskalign.checkpoints.build import build_model
from maskalign.config import as_schedule
from maskalign.models.flops import step_flops


def step_tflop(config, facts, manifest, phase):
    """Forward and backward of one step over the whole batch; see `maskalign.models.flops` for what is counted.

    Args:
        config: of the recipe.
        facts: what `config.validate_with_data` returned.
        manifest: of the training data, for the teachers' widths.
        phase: `clock.Phase`.
    """
    weight = as_schedule(config.method.align_weight)
    ever = max(weight.start, weight.end) > 0
    names = [name for name, _ in facts["teachers"]] or config.teacher.names
    dims = [manifest.teachers[name]["dim"] for name in names] if ever and phase.aligned else []
    with torch.device("meta"):
        model = build_model(config, {**facts, "teacher_dims": dims})
    return config.training.batch_size * step_flops(model, phase.keep) / 1e12
