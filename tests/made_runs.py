"""Runs with a checkpoint that no training wrote."""

import torch

from maskalign.checkpoints import ModelSpec, build_model
from maskalign.config import dump_config, parse_config
from maskalign.training import saving
from maskalign.training.optimizer import Optimizer

SPEC = ModelSpec(
    input_size=8, in_channels=3, num_classes=3, teacher_dims=[5], teachers=["efficientnet-lite0"],
    class_names=["cats", "dogs", "flags"],
)  # fmt: skip
SETTINGS = {
    "model.depth": 4, "model.width": 24, "model.heads": 3, "model.patch_size": 2, "model.projector_dim": 12,
    "model.mixer_hidden": 6, "method.align_depth": 3, "objective.path": "cosine", "optimizer.ema_decay": 0.5,
    "data.path": "nowhere",
}  # fmt: skip


def make_run(folder, seed, **more):
    """A run folder with one checkpoint, two steps old; returns (path, model, averaged weights)."""
    words = [word for key, value in {**SETTINGS, **more}.items() for word in (f"--{key}", str(value))]
    config = parse_config(["--run_dir", str(folder), *words])
    model = build_model(config, SPEC)
    optimizer = Optimizer(model, config.optimizer)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step(0.1, torch.tensor(True))
    state = {"step": 2, "seconds": 1.0, "facts": SPEC.to_dict()}
    saving.save(folder, 2, optimizer.tensors(), state, dump_config(config))
    return folder, model, optimizer.ema_state()
