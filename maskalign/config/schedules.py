"""Values that change over training, and the numbers of tokens that follow from them.

Progress is the share of the run that is done, in [0, 1]. Imports no torch.
"""

import math
from dataclasses import dataclass
from typing import Literal, Optional, Union


@dataclass
class Schedule:
    """A value that changes over training."""

    kind: Literal["constant", "linear", "cosine", "step"] = "constant"
    """How the value goes from start to end."""
    start: float = 0.0
    """The value up to `begin`."""
    end: float = 0.0
    """The value from `until` on (`step` changes at `begin`)."""
    begin: float = 0.0
    """Share of training, in [0, 1], at which the change begins."""
    until: float = 1.0
    """Share of training, in [0, 1], at which the change is complete."""

    @property
    def ends(self):
        """The values at the ends of training; of a constant, whose `end` says nothing, its one value."""
        return (self.start,) if self.kind == "constant" else (self.start, self.end)


Scheduled = Union[float, Schedule]


def as_schedule(value: Scheduled) -> Schedule:
    """A scheduled setting as a `Schedule`; a plain number is constant."""
    if isinstance(value, Schedule):
        return value
    return Schedule(kind="constant", start=float(value), end=float(value))


def schedule_value(setting: Scheduled, progress: float) -> float:
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


def keep_count(keep_ratio: float, tokens: int, multiple: int = 8) -> int:
    """Number of tokens K that a keep ratio stands for, rounded so that compiled graphs see few shapes.

    Args:
        keep_ratio: share of tokens to keep, in (0, 1].
        tokens: number of tokens N.
        multiple: K is the nearest multiple of this (at least one multiple, at most N); a ratio of 1 gives N.

    Raises:
        ValueError: a ratio outside (0, 1].
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio must be in (0, 1], got {keep_ratio}")
    if keep_ratio == 1:
        return tokens
    # Halves go up: the banker's rounding of Python's round() would pull 0.5 of 144 tokens down.
    return min(tokens, max(1, int(keep_ratio * tokens / multiple + 0.5)) * multiple)


class TokenBudget:
    """How many patch tokens of an image a run keeps and aligns, over its training.

    Args:
        method: `MethodConfig`.
        model: `SiT`, or any object with its attributes `num_tokens`, `route` and `tap_sees_subset`.
    """

    def __init__(self, method, model):
        self.method, self.tokens = method, model.num_tokens
        self._subset_at_tap = model.tap_sees_subset
        # With loss-only masking all tokens are at the tap, and those of the subset are aligned.
        self._subset_is_aligned = model.tap_sees_subset or model.route is None

    def kept(self, progress: float) -> int:
        """Number K of patch tokens that are kept."""
        return self._count(schedule_value(self.method.keep_ratio, progress), self.tokens)

    def drawn(self, progress: float, kept: Optional[int] = None) -> Optional[int]:
        """Number of patch tokens that `method.align_ratio` draws of those at the tap; None aligns all of them.

        Args:
            kept: number of kept tokens to use in place of the run's own.
        """
        if self.method.align_ratio is None:
            return None
        present = (self.kept(progress) if kept is None else kept) if self._subset_at_tap else self.tokens
        return self._count(schedule_value(self.method.align_ratio, progress), present)

    def aligned(self, progress: float) -> int:
        """Number of patch tokens with an alignment loss; 0 where its weight is 0."""
        if schedule_value(self.method.align_weight, progress) == 0:
            return 0
        drawn = self.drawn(progress)
        if drawn is not None:
            return drawn
        return self.kept(progress) if self._subset_is_aligned else self.tokens

    @property
    def ends(self):
        """The numbers of kept tokens at the ends of training: one for a constant keep ratio, else two."""
        return tuple(self._count(ratio, self.tokens) for ratio in as_schedule(self.method.keep_ratio).ends)

    @property
    def least(self):
        """The smallest number of kept tokens of the run. The keep ratio is monotonic, so it is that of an end."""
        return min(self.ends)

    @property
    def least_at(self):
        """The progress at which the number of kept tokens is smallest, 0 or 1."""
        return 0.0 if self.ends[0] == self.least else 1.0

    @property
    def varies(self):
        """Whether the number of kept tokens changes over the run."""
        return len(set(self.ends)) > 1

    def _count(self, ratio, tokens):
        return keep_count(ratio, tokens, self.method.keep_multiple)
