"""Ranges of numbers as part of a setting's type: `Annotated[int, Range(at_least=1)]`. Imports no torch.

jsonargparse's own restricted types are not used: they check only what its parser reads, not a `Config` made in Python,
and the values are instances of subclasses of int and float, which YAML's safe writer refuses.
"""

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Callable, Optional, Union, get_args, get_origin

from maskalign.config.schedules import Schedule
from maskalign.errors import UsageError


@dataclass(frozen=True)
class Range:
    """An interval of numbers. At most one lower and one upper bound is given.

    Attributes:
        at_least, above: lower bound, included or excluded.
        at_most, below: upper bound, included or excluded.
    """

    at_least: Optional[float] = None
    above: Optional[float] = None
    at_most: Optional[float] = None
    below: Optional[float] = None

    def __contains__(self, number: float) -> bool:
        return (
            not math.isnan(number)
            and (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __repr__(self):
        low = self.at_least if self.above is None else self.above
        high = self.at_most if self.below is None else self.below
        if low is not None and high is not None:
            return f"in {'[('[self.above is not None]}{low:g}, {high:g}{'])'[self.below is not None]}"
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)


AT_LEAST_0, AT_LEAST_1, ABOVE_0 = Range(at_least=0), Range(at_least=1), Range(above=0)
FROM_0_TO_1, ABOVE_0_TO_1, FROM_0_BELOW_1 = Range(0, at_most=1), Range(above=0, at_most=1), Range(0, below=1)


def range_of(annotation: Any) -> Optional[Range]:
    """The `Range` in a type such as `Annotated[int, Range]` or `Optional[Annotated[int, Range]]`; None without one."""
    parts = [annotation, *get_args(annotation)] if get_origin(annotation) is Union else [annotation]
    found = (entry for part in parts for entry in getattr(part, "__metadata__", ()) if isinstance(entry, Range))
    return next(found, None)


def check_ranges(settings: Any, shown: Callable[[str], str] = str) -> None:
    """Check every number of a settings dataclass, and of the dataclasses in it, against the range in its type.

    Args:
        settings: an instance. None satisfies every range; each number of a tuple, and both ends of a schedule, must
            satisfy it.
        shown: function from a dotted field name to what the user writes, for example `--batch-size`.

    Raises:
        UsageError: a number is outside its range.
    """
    for name, number, wanted in _numbers(settings, ""):
        if number not in wanted:
            raise UsageError(f"{shown(name)}: {number} must be {wanted}")


def _numbers(settings, prefix):
    """(dotted name, number, Range) of every number that has a range."""
    for field in fields(settings):
        name, value, wanted = prefix + field.name, getattr(settings, field.name), range_of(field.type)
        if is_dataclass(value):
            yield from _numbers(value, f"{name}.")
        if wanted is None or value is None:
            continue
        numbers = value.ends if isinstance(value, Schedule) else value if isinstance(value, (tuple, list)) else [value]
        yield from ((name, number, wanted) for number in numbers)
