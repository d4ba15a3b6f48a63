"""Schedules against the values that their definitions give at chosen points."""

import pytest

from maskalign.config import OptimizerConfig, Schedule, schedule_value
from maskalign.training.schedules import learning_rate


@pytest.mark.parametrize(
    "kind, progress, expected",
    [
        ("constant", 0.9, 0.2),
        ("step", 0.24, 0.2),
        ("step", 0.25, 1.0),
        ("linear", 0.25, 0.2),
        ("linear", 0.5, 0.6),
        ("linear", 0.8, 1.0),
        ("cosine", 0.2, 0.2),
        ("cosine", 0.5, 0.6),
        ("cosine", 0.375, 0.2 + 0.8 * (1 - 2**-0.5) / 2),
        ("cosine", 1.0, 1.0),
    ],
)
def test_values(kind, progress, expected):
    schedule = Schedule(kind=kind, start=0.2, end=1.0, begin=0.25, until=0.75)
    assert schedule_value(schedule, progress) == pytest.approx(expected)


def test_a_number_is_constant():
    assert schedule_value(0.3, 0.0) == schedule_value(0.3, 1.0) == 0.3


def test_learning_rate_warms_up_and_decays():
    own = OptimizerConfig(lr=1.0, warmup_steps=4, decay="cosine", decay_from=0.5)
    assert [learning_rate(own, step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert learning_rate(own, 100, 0.5) == 1.0
    assert learning_rate(own, 100, 0.75) == pytest.approx(0.5)
    assert learning_rate(own, 100, 1.0) == pytest.approx(0.0, abs=1e-12)
    linear = OptimizerConfig(lr=2.0, decay="linear", decay_from=0.5)
    assert learning_rate(linear, 0, 0.75) == pytest.approx(1.0)
    assert learning_rate(OptimizerConfig(lr=3.0), 0, 1.0) == 3.0
