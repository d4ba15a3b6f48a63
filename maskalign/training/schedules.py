"""Values that change over training, as functions of progress: the share of the run that is done, in [0, 1]."""

import math

from maskalign.config import as_schedule


def schedule_value(setting, progress):
    """Value of a scheduled setting (a number or a `Schedule`) at `progress`."""
    schedule = as_schedule(setting)
    if schedule.kind == "constant":
        return schedule.start
    if schedule.kind == "step":
        return schedule.end if progress >= schedule.begin else schedule.start
    span = schedule.until - schedule.begin
    share = min(1.0, max(0.0, (progress - schedule.begin) / span)) if span > 0 else float(progress >= schedule.begin)
    if schedule.kind == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return schedule.start + (schedule.end - schedule.start) * share


def learning_rate(optimizer, step, progress):
    """Learning rate of a step: linear warm-up, then constant, or a linear or cosine fall to zero from `decay_from` on.

    Args:
        optimizer: `OptimizerConfig`.
        step: the step's number, from 0.
        progress: share of the run that is done.
    """
    rate = optimizer.lr * min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else optimizer.lr
    if optimizer.decay == "constant" or progress <= optimizer.decay_from:
        return rate
    share = min(1.0, (progress - optimizer.decay_from) / (1 - optimizer.decay_from))
    return rate * ((1 - share) if optimizer.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)
