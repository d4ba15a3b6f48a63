"""Settings of an evaluation. They are read and checked before torch is imported."""

from dataclasses import dataclass

from maskalign.config.option import option
from maskalign.errors import UsageError

METRICS = ("frechet", "kernel", "neighbors")
NEAREST = 5  # number of neighbors for density and coverage; precision and recall need only 3


def parse_metrics(text):
    """`--metrics` as a tuple of names; `none` for none of them."""
    words = [word.strip() for word in text.strip("[]() ").split(",") if word.strip()]
    words = ["neighbors" if word == "neighbours" else word for word in words]  # its name before 0.3
    return () if words == ["none"] else tuple(dict.fromkeys(METRICS if words == ["all"] else words))


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation."""

    metrics: tuple = option(METRICS, parse=parse_metrics, metavar="NAMES")
    """Any of frechet, kernel, neighbors (precision, recall, density, coverage), separated by commas; all, or none."""
    samples: int | None = None
    """Number of images to draw, by default 1000; of existing images, the first ones are used, by default all."""
    reference: int = 5000
    """Number of real images to compare with, 0 for all; compare only distances with the same number."""
    held_out_images: int = option(1000, group="losses")
    """Number of held-out images for the losses of a model; 0 for no losses."""
    bins: int = option(10, group="losses")
    """Number of bins of the time in [0, 1] for the losses."""
    allow_singular: bool = False
    """Report Frechet distances even if there are too few images for a covariance of full rank; they are too large."""
    batch_size: int = 64
    """Images per batch."""

    def __post_init__(self):
        for metric in self.metrics:
            _require(metric in METRICS, "--metrics", repr(metric), f"is not one of {', '.join(METRICS)}")
        _require(self.samples is None or self.samples >= 2, "--samples", self.samples, "must be at least 2")
        _require(self.reference == 0 or self.reference >= 2, "--reference", self.reference, "must be 0 or at least 2")
        _require(self.held_out_images >= 0, "--held-out-images", self.held_out_images, "must be at least 0")
        _require(1 <= self.bins <= 1000, "--bins", self.bins, "must be in 1 to 1000")
        _require(self.batch_size >= 1, "--batch-size", self.batch_size, "must be at least 1")

    def check_counts(self, samples, reference, name, dim):
        """Raise a UsageError if there are too few images for a metric, before any of them is read.

        Args:
            samples, reference: numbers of images.
            name, dim: name and dimension of the features.
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
