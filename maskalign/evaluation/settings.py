"""What an evaluation measures: settings that are read and checked before torch is imported."""

from dataclasses import dataclass

from maskalign.config.option import option
from maskalign.errors import UsageError

METRICS = ("frechet", "kernel", "neighbors")
NEAREST = 5  # of density and coverage, the larger one of the two neighborhoods (precision and recall: 3)


def parse_metrics(text):
    """`--metrics` as a tuple of names; `none` for none of them."""
    words = [word.strip() for word in text.strip("[]() ").split(",") if word.strip()]
    words = ["neighbors" if word == "neighbours" else word for word in words]  # its name before 0.3
    return () if words == ["none"] else tuple(dict.fromkeys(METRICS if words == ["all"] else words))


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation."""

    metrics: tuple = option(METRICS, parse=parse_metrics, metavar="NAMES")
    """Of frechet, kernel, neighbors (precision, recall, density, coverage), with commas; all, or none."""
    samples: int | None = None
    """Pictures to draw, by default 1000; of pictures that exist the first so many, by default all."""
    reference: int = 5000
    """Real images to compare with, 0 for all; the distances depend on this number, so keep it."""
    held_out_images: int = option(1000, group="losses")
    """Held-out images for the losses of a model; 0 leaves the losses out."""
    bins: int = option(10, group="losses")
    """Bins of the time in [0, 1]."""
    allow_singular: bool = False
    """Report Frechet distances of no more pictures than features have dimensions, which are too large."""
    batch_size: int = 64
    """Pictures at a time."""

    def __post_init__(self):
        for metric in self.metrics:
            _require(metric in METRICS, "--metrics", repr(metric), f"is not one of {', '.join(METRICS)}")
        _require(self.samples is None or self.samples >= 2, "--samples", self.samples, "must be at least 2")
        _require(self.reference == 0 or self.reference >= 2, "--reference", self.reference, "must be 0 or at least 2")
        _require(self.held_out_images >= 0, "--held-out-images", self.held_out_images, "must be at least 0")
        _require(1 <= self.bins <= 1000, "--bins", self.bins, "must be in 1 to 1000")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")

    def check_counts(self, samples, reference, name, dim):
        """Raise a UsageError where there are too few pictures for a metric, before any of them is read.

        Args:
            samples, reference: numbers of pictures; name, dim: of the features.
        """
        for what, count, flag in (("pictures", samples, "samples"), ("reference pictures", reference, "reference")):
            if count < 2:
                remedy = "give at least 2" if flag == "samples" else "raise --reference, or choose other --classes"
                raise UsageError(f"{count} {what} are too few for any distance; {remedy}")
            if "frechet" in self.metrics and not self.allow_singular and count <= dim:
                raise UsageError(
                    f"{count} {what} are too few for a covariance of the {dim} features of {name}: give at least "
                    f"{dim + 1} (--{flag}), leave the Frechet distance out (--metrics kernel,neighbors), or take "
                    "the biased number (--allow-singular)"
                )
            if "neighbors" in self.metrics and count <= NEAREST:
                raise UsageError(
                    f"{count} {what} are too few for {NEAREST} nearest neighbors; give at least {NEAREST + 1}, or "
                    "--metrics frechet,kernel"
                )


def _require(condition, what, value, rule):
    if not condition:
        raise UsageError(f"{what}: {value} {rule}")
