"""What `maskalign analyze` measures on. Light: read and checked before torch is imported."""

from dataclasses import dataclass
from typing import Optional

from maskalign.errors import UsageError


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis.

    Attributes:
        images: images of the data set that are looked at, the first ones in the order of `seed`.
        times: numbers in (0, 1), ascending; 1 is noise.
        draws: draws of noise and of a subset for every image; each is used at all times and for all checkpoints.
        keep_ratio: share of tokens in a subset; None takes the run's own (the smallest of its schedule), and 0.5 for a
            run that keeps all tokens or does not say.
        top: share of an image's tokens that counts as "the largest".
        batch_size: images at a time, and images behind one gradient of the trunk.
        seed: of every draw, of the order of the images and of the permutations.
        permutations: random relabellings behind every interval of chance.
        mask_ratio: share r of the patches that is dropped for the stability gap G_r.
        subsets: random subsets of every image behind the gap, all under the same noise.
    """

    images: int = 256
    times: tuple = (0.1, 0.3, 0.5, 0.7, 0.9)
    draws: int = 4
    keep_ratio: Optional[float] = None
    top: float = 0.1
    batch_size: int = 32
    seed: int = 0
    permutations: int = 1000
    mask_ratio: float = 0.25
    subsets: int = 4

    def __post_init__(self):
        _require(self.images >= 4, "--images", self.images, "must be at least 4, since halves are compared")
        inside = len(self.times) > 0 and all(0 < time < 1 for time in self.times)
        _require(inside, "--times", list(self.times), "must be numbers between 0 (data) and 1 (noise), as 0.1,0.5")
        ascending = list(self.times) == sorted(set(self.times))
        _require(ascending, "--times", list(self.times), "must rise, and name no time twice")
        _require(self.draws >= 2, "--draws", self.draws, "must be at least 2, since draws are compared")
        keep = self.keep_ratio
        _require(keep is None or 0 < keep < 1, "--keep-ratio", keep, "must be between 0 and 1")
        _require(0 < self.top <= 0.5, "--top", self.top, "must be above 0 and at most 0.5")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")
        _require(0 < self.mask_ratio < 1, "--mask-ratio", self.mask_ratio, "must be between 0 and 1")
        _require(self.subsets >= 2, "--subsets", self.subsets, "must be at least 2, since their spread is measured")
        _require(self.permutations >= 20, "--permutations", self.permutations, "must be at least 20")


def parse_times(text):
    """`0.1,0.5,0.9` as a tuple of floats."""
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise UsageError(f"--times: {text!r} is not a list of numbers, e.g. 0.1,0.5,0.9") from None


def _require(condition, what, value, rule):
    if not condition:
        raise UsageError(f"{what}: {value} {rule}")
