"""Velocity loss and alignment cosine of a model on held-out images, by time.

Every image is met once in every bin of time. Its noise, its place inside the bins and its draw from the VAE's posterior
are keyed by its number in the set, so the result is a function of the weights, the set and the bins alone.
"""

from typing import NamedTuple

import torch

from maskalign.data.manifest import Manifest
from maskalign.data.stream import ShardStream
from maskalign.errors import UsageError
from maskalign.evaluation.losses import velocity_and_cosine
from maskalign.objective.flow_matching import sample_posterior
from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.drawing import evaluating
from maskalign.sampling.noise import ImageNoise
from maskalign.teachers import load_teacher, load_teacher_like

SEED = 20_260_608


class TeacherTokens(NamedTuple):
    """A teacher's tokens of held-out images: the name, the network that makes them (None: cached in the shards), and
    the grid of the tokens."""

    name: str
    network: object
    grid: tuple


def choose_teachers(names, training, held_out, *, normalize="none", weights=None, device="cpu"):
    """How to get the tokens that a run was aligned with, for other images.

    The shards' own are taken where they are normalised as those of the training were; else the teacher is run.

    Args:
        names: the run's teachers. training, held_out: the two `Manifest`s, the first None where it cannot be read.
        normalize, weights: of a teacher that no manifest knows, as in the run's settings.

    Returns:
        list of TeacherTokens.
    """
    chosen = []
    for name in names:
        there = held_out.teachers.get(name)
        entry = (training.teachers.get(name) if training is not None else None) or there
        keys = ("normalize", "mean", "grid")
        if there is not None and all(there.get(key) == entry.get(key) for key in keys):
            chosen.append(TeacherTokens(name, None, tuple(there["grid"])))
            continue
        if held_out.image_format is None:
            raise UsageError(f"teacher {name}: the held-out data set has neither its features nor images")
        own = dict(weights=weights, image_size=held_out.resolution, device=device)
        network = load_teacher_like(name, entry, **own) if entry else load_teacher(name, normalize=normalize, **own)
        chosen.append(TeacherTokens(name, network, network.grid))
    return chosen


class HeldOut:
    """Held-out images for `losses_by_time`, read again at every pass.

    Args:
        path: the data set.
        count: images; 0 for all.
        teachers: list of `TeacherTokens`; () for the velocity loss alone.
        batch_size: images at a time.
    """

    def __init__(self, path, count, teachers=(), batch_size=64):
        self.path, self.teachers, self.batch_size = path, list(teachers), batch_size
        self.manifest = Manifest.load(path)
        there = self.manifest.num_samples
        self.count = min(count, there) if count else there

    def batches(self, device="cpu"):
        """Yield (first number, x (b, C, H, W) float32, labels (b,), [(tokens, grid) per teacher])."""
        latent = self.manifest.latent
        fields = [teacher.name for teacher in self.teachers if teacher.network is None]
        needs_images = latent is None or any(teacher.network is not None for teacher in self.teachers)
        fields += (["image"] if needs_images else []) + (["moments"] if latent is not None else [])
        stream = ShardStream(
            self.path, self.batch_size, seed=0, epochs=1, streams=1, fields=fields, hflip=False, pin_memory=False
        )
        first = 0
        for batch in stream:
            rows = slice(0, self.count - first)
            labels = batch["label"][rows].to(device)
            images = batch["image"][rows].to(device) if needs_images else None
            tokens = [
                (batch[t.name][rows].to(device) if t.network is None else t.network(images), t.grid)
                for t in self.teachers
            ]
            if latent is None:
                x = images.float() / 127.5 - 1
            else:
                moments = batch["moments"][rows].to(device).float()
                shape = (moments.shape[1] // 2, *moments.shape[2:])
                draw = ImageNoise(SEED + 2, range(first, first + len(labels)), shape, device).draw()
                x = sample_posterior(moments, draw, latent["scale"], latent["bias"])
            yield first, x, labels, tokens
            first += len(labels)
            if first >= self.count:
                break


@torch.no_grad()
def losses_by_time(model, held_out, *, bins=10, path="linear", on_images=None):
    """Velocity loss and alignment cosine of a model in equal bins of the time in [0, 1].

    Args:
        model: a `SiT`, with the weights to measure.
        held_out: `HeldOut`.
        bins: how many.
        path: the interpolant's path.
        on_images: called with the number of images of every batch.

    Returns:
        dict: `velocity_loss` (mean squared error over all elements) and, where the model has projectors and the
        teachers are there, `cosine` (a mean over teachers); each a list with a number per bin. Their means over the
        bins estimate the means over uniform times.
    """
    device = next(model.parameters()).device
    interpolant, sums, cosine_sums, count = Interpolant(path), [0.0] * bins, [0.0] * bins, 0
    has_cosine = False
    with evaluating(model):
        for first, x, labels, teachers in held_out.batches(device):
            numbers = range(first, first + len(x))
            noise = ImageNoise(SEED, numbers, x.shape[1:], device).draw()
            normal = ImageNoise(SEED + 1, numbers, (1,)).draw(torch.float64).flatten()
            place = torch.special.ndtr(normal).to(device)  # uniform in (0, 1)
            for index in range(bins):
                t = ((index + place) / bins).float()
                loss, cosines = velocity_and_cosine(model, x, noise, t, labels, teachers, interpolant)
                sums[index] += float(loss.sum())
                if cosines:
                    has_cosine = True
                    cosine_sums[index] += float(torch.stack(cosines).mean(dim=0).sum())
            count += len(x)
            if on_images:
                on_images(len(x))
    found = {"velocity_loss": [value / count for value in sums]}
    if has_cosine:
        found["cosine"] = [value / count for value in cosine_sums]
    return found


def bin_names(bins):
    """Names of the bins of time: 0.0-0.1, 0.1-0.2, ..."""
    digits = max(1, len(f"{1 / bins:.6g}") - 2) if bins > 1 else 1
    return [f"{k / bins:.{min(digits, 4)}f}-{(k + 1) / bins:.{min(digits, 4)}f}" for k in range(bins)]
