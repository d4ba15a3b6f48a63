"""The learning rate over training."""

import math


def learning_rate(optimizer, step, progress):
    """Learning rate of a step: linear warm-up, then constant, or a linear or cosine decay to zero from `decay_from` on.

    Args:
        optimizer: `OptimizerConfig`.
        step: the step's number, from 0.
        progress: share of the run that is done, in [0, 1].
    """
    rate = optimizer.lr * min(1.0, (step + 1) / optimizer.warmup_steps) if optimizer.warmup_steps else optimizer.lr
    if optimizer.decay == "constant" or progress <= optimizer.decay_from:
        return rate
    share = min(1.0, (progress - optimizer.decay_from) / (1 - optimizer.decay_from))
    return rate * ((1 - share) if optimizer.decay == "linear" else (1 + math.cos(math.pi * share)) / 2)
