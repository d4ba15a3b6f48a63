"""What `benchmarks.convergence` measures of a checkpoint, on the moving average of its weights and held-out images.

Every number is a function of the checkpoint and of fixed seeds: all recipes see the same images, times, noise, labels.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from maskalign.data.manifest import Manifest
from maskalign.data.stream import ShardStream
from maskalign.evaluation import frechet_distance, kernel_distance, velocity_and_cosine
from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.drawing import generate
from maskalign.sampling.pictures import to_uint8
from maskalign.sampling.settings import Sampling
from maskalign.teachers import load_teacher_like

NOISE_SEED, SAMPLE_SEED = 20_260_608, 7


class Heldout:
    """Held-out images, their labels and the teacher's features, computed once and kept in a file.

    Args:
        train, test: folders of the two parts; the training part's manifest says how the teacher was normalised.
        teacher: its name.
        images: held-out images for the losses and the cosine; reference: images for the distances.
    """

    def __init__(self, train, test, teacher, images, reference):
        self.manifest, self.name, self.test = Manifest.load(train), teacher, test
        there = Manifest.load(test).num_samples
        self.images, self.reference = min(images, there), min(reference, there)
        self.path = Path(test).parent / f"heldout-{teacher.replace('/', '-')}-{self.images}-{self.reference}.npz"

    @cached_property
    def teacher(self):
        """The live teacher, whose tokens are those that the training part caches."""
        entry = self.manifest.teachers[self.name]
        return load_teacher_like(self.name, entry, image_size=self.manifest.resolution)

    @cached_property
    def arrays(self):
        """images (n, 3, H, W) uint8, labels (m,), tokens (n, N, Dz) float16, pooled (m, Dz) float32."""
        if not self.path.is_file():
            self._compute()
        with np.load(self.path) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}

    def pooled(self, images):
        """Features of images (B, 3, H, W) uint8 for the distances: (B, Dz), the mean over the teacher's tokens."""
        return torch.cat([self.teacher(part).mean(dim=1) for part in images.split(32)])

    def _compute(self):
        count = max(self.images, self.reference)
        batch = min(32, count)
        stream = ShardStream(self.test, batch, seed=0, epochs=1, streams=1, fields=["image"])
        images, labels = [], []
        for part in stream:
            images.append(part["image"])
            labels.append(part["label"])
            if sum(map(len, labels)) >= count:
                break
        images, labels = torch.cat(images)[:count], torch.cat(labels)[:count]
        tokens = torch.cat([self.teacher(part).half() for part in images[: self.images].split(32)])
        pooled = self.pooled(images[: self.reference])
        temporary = self.path.with_name(f".{self.path.name}.tmp.npz")
        arrays = {"images": images[: self.images], "labels": labels, "tokens": tokens, "pooled": pooled}
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
        dict (metric, time) -> value: `velocity_loss` (mean squared error over all elements) and, where the model has a
        projector, `cosine` (mean over tokens).
    """
    arrays = heldout.arrays
    images = arrays["images"].float() / 127.5 - 1
    labels, tokens = arrays["labels"][: len(images)], arrays["tokens"]
    grid = heldout.teacher.grid
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(NOISE_SEED))
    interpolant, found = Interpolant(path), {}
    for time in times:
        t = torch.full((len(images),), float(time))
        losses, cosines = [], []
        for begin in range(0, len(images), batch):
            rows = slice(begin, begin + batch)
            teachers = [(tokens[rows], grid)]
            part = velocity_and_cosine(model, images[rows], noise[rows], t[rows], labels[rows], teachers, interpolant)
            losses.append(part[0])
            cosines += part[1]
        found["velocity_loss", time] = float(torch.cat(losses).mean())
        if cosines:
            found["cosine", time] = float(torch.cat(cosines).mean())
    return found


def sample_distances(model, heldout, samples, steps, path="linear", precision="fp32"):
    """Frechet and kernel distance between samples and held-out images, in the teacher's pooled features.

    Samples are drawn without guidance by Euler's method, with the held-out images' labels in turn, in `precision`.

    Returns:
        dict: `frechet`, `kernel`.
    """
    arrays = heldout.arrays
    labels = arrays["labels"][torch.arange(samples) % len(arrays["labels"])]
    settings = Sampling("ode", steps, path=path, seed=SAMPLE_SEED, batch_size=64, precision=precision)
    pictures = to_uint8(generate(model, labels, settings)).permute(0, 3, 1, 2)
    features, real = heldout.pooled(pictures).double().numpy(), arrays["pooled"].double().numpy()
    return {"frechet": frechet_distance(features, real), "kernel": kernel_distance(features, real)}
