"""Settings of `maskalign analyze`. They are read and checked before torch is imported."""

from dataclasses import dataclass
from typing import Optional

from maskalign.config.option import option
from maskalign.errors import UsageError


def parse_times(text):
    """`0.1,0.5,0.9` as a tuple of floats."""
    try:
        return tuple(float(part) for part in text.strip("[]() ").split(","))
    except ValueError:
        raise UsageError(f"--times: {text!r} is not a list of numbers, e.g. 0.1,0.5,0.9") from None


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of an analysis."""

    images: int = 256
    """Number of images of the data set to use, the first ones in the order of the seed."""
    times: tuple = option((0.1, 0.3, 0.5, 0.7, 0.9), parse=parse_times, metavar="T,T,...")
    """Ascending times between 0 (data) and 1 (noise)."""
    draws: int = 4
    """Draws of noise and of a subset for every image; each is used at all times and for all checkpoints."""
    keep_ratio: Optional[float] = None
    """Share of tokens in a subset; by default the run's own (the smallest of its schedule), or 0.5 if it keeps all
    tokens."""
    top: float = 0.1
    """Share of an image's tokens that counts as the largest."""
    batch_size: int = 32
    """Images per batch, and images per gradient of the trunk."""
    seed: int = 0
    """Seed of the order of the images, of noise, subsets and permutations."""
    permutations: int = 1000
    """Random permutations from which the interval of chance is computed."""
    mask_ratio: float = option(0.25, group="stability gap")
    """Share of the patches that is dropped for the stability gap."""
    subsets: int = option(4, group="stability gap")
    """Random subsets of every image for the stability gap, all under the same noise."""

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


def _require(condition, what, value, rule):
    if not condition:
        raise UsageError(f"{what}: {value} {rule}")
