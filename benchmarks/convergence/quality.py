"""Measurements of `benchmarks.convergence` on a checkpoint: averaged weights, held-out images.

Every number depends only on the checkpoint and fixed seeds, and all recipes have the same images, times, noise and
labels. A model with a class token gets the class token of the held-out image, noised as in training, which contains
information about the image. Its losses and cosines therefore have different names (`GIVEN_CLASS`) and are compared only
with those of other such models.
"""

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.convergence.classifier import load_classifier, load_images
from maskalign.data.format.manifest import Manifest
from maskalign.evaluation import frechet_distance, kernel_distance, velocity_and_cosine
from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.drawing import generate
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.settings import Sampling
from maskalign.teachers import load_teacher_like

NOISE_SEED, CLASS_NOISE_SEED, SAMPLE_SEED = 20_260_608, 20_260_609, 7
GIVEN_CLASS = "_given_class"  # suffix of the measurements of models with a class token
CLASSIFIER = "_cnn"  # suffix of distances in the classifier's features


class Heldout:
    """Held-out images, their labels and the teacher's features, which are computed once and stored in a file.

    Args:
        train, test: folders of the two parts; the teacher's normalization is in the training part's manifest.
        teacher: name of the teacher.
        images: number of held-out images for the losses and the cosine.
        reference: number of images for the distances.
        classifier: file of the classifier for the distances; None to use the teacher.
    """

    def __init__(self, train, test, teacher, images, reference, classifier=None):
        self.manifest, self.name, self.test, self.classifier = Manifest.load(train), teacher, test, classifier
        there = Manifest.load(test).num_samples
        self.images, self.reference = min(images, there), min(reference, there)
        name = f"heldout-{teacher.replace('/', '-')}-{self.images}-{self.reference}"
        self.path = Path(test).parent / f"{name}-class{CLASSIFIER if classifier else ''}.npz"

    @cached_property
    def teacher(self):
        """The teacher network, with the same normalization of tokens and class tokens as the cached training part."""
        entry = self.manifest.teachers[self.name]
        return load_teacher_like(self.name, entry, image_size=self.manifest.resolution)

    @cached_property
    def network(self):
        """The classifier of the distances."""
        return load_classifier(self.classifier)

    @cached_property
    def arrays(self):
        """images (n, 3, H, W) uint8, labels (m,), tokens (n, N, Dz) and class_tokens (n, Dz) float16, pooled (m, D)."""
        if not self.path.is_file():
            self._compute()
        with np.load(self.path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def pooled(self, images):
        """Features (B, D) of images (B, 3, H, W) uint8 for the distances: the classifier's features, or the mean over
        the teacher's tokens.
        """
        if self.classifier:
            with torch.no_grad():
                return torch.cat([self.network.features(part) for part in images.split(250)])
        return torch.cat([self.teacher(part).mean(dim=1) for part in images.split(32)])

    def class_tokens(self, dim):
        """Class tokens of the n images for a model with a class token of width `dim`: (n, dim) float32."""
        values, entry = self.arrays["class_tokens"].float(), self.manifest.teachers[self.name]["class_token"]
        if dim == entry["dim"]:
            return values
        parts = (torch.tensor(entry["components"][key]) for key in ("mean", "basis", "scale"))
        mean, basis, scale = parts
        return ((values - mean) @ basis[:dim].T) / scale[:dim]

    def _compute(self):
        images, labels = load_images(self.test, max(self.images, self.reference))
        found = [self.teacher.tokens_and_class(part) for part in images[: self.images].split(32)]
        tokens, class_tokens = (torch.cat(column).half() for column in zip(*found, strict=True))
        pooled = self.pooled(images[: self.reference])
        temporary = self.path.with_name(f".{self.path.name}.tmp.npz")
        arrays = {"images": images[: self.images], "labels": labels, "tokens": tokens, "pooled": pooled}
        arrays["class_tokens"] = class_tokens
        np.savez(temporary, **{name: array.numpy() for name, array in arrays.items()})
        temporary.rename(self.path)


@torch.no_grad()
def heldout_losses(model, heldout, times, path="linear", batch=64):
    """Full-token velocity loss and alignment cosine at fixed times.

    Args:
        model: a `SiT` in eval mode.
        heldout: `Heldout`.
        times: numbers in (0, 1).
        path: the interpolant's path.

    Returns:
        dict (metric, time) -> value: `velocity_loss` (mean squared error over all elements) and, if the model has a
        projector, `cosine` (mean over the patches); with the suffix `GIVEN_CLASS` for a model with a class token.
    """
    arrays = heldout.arrays
    images = arrays["images"].float() / 127.5 - 1
    labels, tokens = arrays["labels"][: len(images)], arrays["tokens"]
    grid, class_dim = heldout.teacher.grid, getattr(model, "class_dim", None)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    interpolant, found, ending = Interpolant(path), {}, ""
    if class_dim:
        class_tokens, ending = heldout.class_tokens(class_dim), GIVEN_CLASS
        class_noise = torch.randn(class_tokens.shape, generator=torch.Generator().manual_seed(CLASS_NOISE_SEED))
    for time in times:
        t = torch.full((len(images),), float(time))
        losses, cosines = [], []
        for begin in range(0, len(images), batch):
            rows = slice(begin, begin + batch)
            teachers, called = [(tokens[rows], grid)], model
            if class_dim:
                noised, _ = interpolant.interpolate(class_tokens[rows], class_noise[rows], t[rows])
                called = given(model, noised)
            part = velocity_and_cosine(called, images[rows], noise[rows], t[rows], labels[rows], teachers, interpolant)
            losses.append(part[0])
            cosines += part[1]
        found[f"velocity_loss{ending}", time] = float(torch.cat(losses).mean())
        if cosines:
            found[f"cosine{ending}", time] = float(torch.cat(cosines).mean())
    return found


def given(model, class_token):
    """Wrap a model with a class token, so that it is called as `(x, t, labels)` and returns only the patches."""

    def call(x, t, labels):
        out = model(x, t, labels, class_token=class_token)
        # If the projector returns one row more than there are patches, the first row is the class token.
        aligned = [rows[:, rows.shape[1] - model.num_tokens :] for rows in out.aligned]
        return SimpleNamespace(velocity=out.velocity, aligned=aligned)

    call.grid = model.grid
    return call


def sample_distances(model, heldout, samples, steps, path="linear", precision="fp32"):
    """Frechet and kernel distance between samples and held-out images, in the features of `heldout`.

    Samples are drawn without guidance with Euler's method, with the held-out images' labels in turn, in `precision`.

    Returns:
        dict: `frechet`, `kernel`; with the suffix `CLASSIFIER` for the classifier's features.
    """
    arrays = heldout.arrays
    labels = arrays["labels"][torch.arange(samples) % len(arrays["labels"])]
    settings = Sampling("ode", steps, path=path, seed=SAMPLE_SEED, batch_size=64, precision=precision)
    pictures = to_uint8(generate(model, labels, settings)).permute(0, 3, 1, 2)
    return distances(heldout, pictures)


def real_distances(heldout, train, count):
    """The distances of `count` training images instead of samples: the lowest values that can be expected."""
    return distances(heldout, load_images(train, count)[0])


def distances(heldout, pictures):
    """The distances of images (n, 3, H, W) uint8, see `sample_distances`."""
    features, real = heldout.pooled(pictures).double().numpy(), heldout.arrays["pooled"].double().numpy()
    ending = CLASSIFIER if heldout.classifier else ""
    return {f"frechet{ending}": frechet_distance(features, real), f"kernel{ending}": kernel_distance(features, real)}
