"""How many tokens a run keeps and aligns: against the numbers that its steps really draw."""

from types import SimpleNamespace

import pytest
import torch

from maskalign.config import MethodConfig, Schedule, TokenBudget, parse_config
from maskalign.models import SiT
from maskalign.training.optimizer import Optimizer
from maskalign.training.step import TrainStep

FALLING = Schedule("linear", start=1.0, end=0.25)
RISING = Schedule("step", start=0.3, end=1.0, begin=0.5)


def budget(tokens=64, at_tap=True, route=(0, 4), **method):
    model = SimpleNamespace(num_tokens=tokens, tap_sees_subset=at_tap, route=route)
    return TokenBudget(MethodConfig(**method), model)


def test_a_constant_ratio():
    constant = budget(tokens=100, keep_ratio=0.5)
    assert constant.kept(0.0) == constant.kept(1.0) == constant.least == 48, "the nearest multiple of 8"
    assert (
        constant.ends == (48,) and not constant.varies and constant.drawn(0.3) is None and constant.aligned(0.3) == 48
    )


def test_a_changing_ratio():
    rising = budget(keep_ratio=RISING)
    assert [rising.kept(p) for p in (0, 0.49, 0.5, 1)] == [16, 16, 64, 64]
    assert rising.ends == (16, 64) and rising.varies and (rising.least, rising.least_at) == (16, 0.0)
    falling = budget(keep_ratio=FALLING)
    assert (falling.least, falling.least_at) == (16, 1.0)
    assert not budget(keep_ratio=Schedule("linear", start=0.5, end=0.51)).varies, "both round to 32"


def test_where_the_alignment_loss_is():
    off = Schedule("step", start=0.5, end=0.0, begin=0.5)
    assert [budget(align_weight=off).aligned(p) for p in (0.4, 0.6)] == [48, 0]
    assert budget(at_tap=False, keep_ratio=0.5).aligned(0) == 64, "the dropped tokens are back at the tap"
    assert budget(at_tap=False, route=None, keep_ratio=0.5).aligned(0) == 32, "loss-only masking"
    half = Schedule("linear", start=1.0, end=0.5)
    assert [budget(keep_ratio=0.5, align_ratio=half).drawn(p) for p in (0, 1)] == [32, 16]
    assert [budget(at_tap=False, keep_ratio=0.5, align_ratio=half).drawn(p) for p in (0, 1)] == [64, 32]
    assert budget(keep_ratio=0.5, align_ratio=0.5).drawn(0, kept=16) == 8


@pytest.mark.parametrize(
    "settings",
    [
        ["--method.keep_ratio", "{kind: linear, start: 0.25, end: 1.0}"],
        ["--method.keep_ratio=0.5", "--method.align_ratio", "{kind: linear, start: 1.0, end: 0.25}"],
        ["--method.keep_ratio=0.5", "--method.route=[1, 2]", "--method.restore=bypass", "--method.align_ratio=0.5"],
        ["--method.keep_ratio=0.5", "--method.route=none"],
    ],
    ids=["rising", "align-ratio", "bypass", "loss-only"],
)
def test_steps_draw_what_the_budget_says(settings):
    sizes = ["--model.depth=3", "--model.width=32", "--model.heads=2", "--model.patch_size=2", "--model.mixer=none"]
    config = parse_config([*sizes, "--method.align_depth=3", *settings])
    route = config.method.route
    route = {"all": (0, 3), "none": None}[route] if isinstance(route, str) else tuple(route)
    model = SiT(
        input_size=16, in_channels=3, patch_size=2, width=32, depth=3, heads=2, num_classes=3, teacher_dims=(8,),
        align_depth=3, mixer="none", route=route, restore=config.method.restore,
    )  # fmt: skip
    place = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, mesh=None, world_size=1, rank=0)
    step = TrainStep(model, Optimizer(model, config.optimizer), config, place)
    tokens = TokenBudget(config.method, model)
    for progress in (0.0, 0.4, 1.0):
        draws = step.draws(0, 0, 2, tokens.kept(progress), tokens.drawn(progress), False)
        out = model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.zeros(2, dtype=torch.long), subset=draws.subset,
                    align_subset=draws.align_subset)  # fmt: skip
        assert out.aligned[0].shape[1] == tokens.aligned(progress)
