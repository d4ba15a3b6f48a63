"""A model with `fused_adaln` computes the numbers of one without it."""

import pytest
import torch

from maskalign.checkpoints.build import build_model
from maskalign.checkpoints.spec import ModelSpec
from maskalign.config import Config
from maskalign.models import SiT, draw_subset

SIZES = dict(
    input_size=8, patch_size=2, in_channels=3, num_classes=7, depth=3, width=24, heads=3, teacher_dims=(10,),
    align_depth=2, projector_dim=12,
)  # fmt: skip


def make_model(seed, dtype, fused, **settings):
    """None of its parameters is at its initial zero."""
    torch.manual_seed(seed)
    model = SiT(**SIZES, **settings, fused_adaln=fused).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "settings",
    [
        {"class_dim": 5},
        {"mixer_layers": 1},
        {"mixer": "none", "route": (1, 2), "restore": "bypass", "qk_norm": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("keep", [11, None])
def test_the_same_numbers_to_the_bit(settings, dtype, keep, seed):
    """On a CPU: velocities, projections, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 3, 8, 8, generator=generator).to(dtype)
    t = torch.rand(3, generator=generator).to(dtype)
    labels = torch.randint(0, 8, (3,), generator=generator)
    subset = None if keep is None else draw_subset(3, (4, 4), keep, generator=generator)
    token = torch.randn(3, 5, generator=generator).to(dtype) if "class_dim" in settings else None
    results = []
    for fused in (False, True):
        model = make_model(seed, dtype, fused, **settings)
        out = model(x, t, labels, subset=subset, class_token=token)
        outputs = [out.velocity, *out.aligned] + ([] if token is None else [out.class_velocity])
        gradients = torch.autograd.grad(sum(o.square().sum() for o in outputs), list(model.parameters()))
        results.append([*outputs, *gradients])
    assert all(torch.equal(plain, fused) for plain, fused in zip(*results, strict=True))


def test_the_setting_reaches_every_block():
    config = Config()
    config.model.depth, config.model.width, config.model.heads, config.model.patch_size = 3, 24, 3, 2
    spec = ModelSpec(input_size=8, in_channels=3, num_classes=7, teacher_dims=[10])
    assert not any(block.fused_adaln for block in build_model(config, spec).all_blocks)
    config.model.fused_adaln = True
    blocks = build_model(config, spec).all_blocks
    assert len(blocks) == 5 and all(block.fused_adaln for block in blocks)


def test_compiles_without_a_graph_break(seed):
    model = make_model(seed, torch.float32, True)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([1, 7])
    subset = draw_subset(2, (4, 4), 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, labels, subset).velocity, model(x, t, labels, subset).velocity)
