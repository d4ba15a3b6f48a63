"""Velocity loss and alignment cosine of a model on held-out images, by time.

Every image is used once in every bin of time. Its noise, its time inside each bin and its draw from the VAE's posterior
are keyed by its number in the set, so the result depends only on the weights, the set and the bins.

A model with a class token gets the noised class token of the true image, which contains information about the image.
Its held-out losses can be compared only with those of models with the same class token.
"""

from typing import NamedTuple, Optional

import torch

from maskalign.config.teacher_names import class_field, no_class_tokens, parse_teachers
from maskalign.data import ShardStream
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.evaluation.losses import velocity_and_cosine
from maskalign.objective.flow_matching import sample_posterior
from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.drawing import evaluating
from maskalign.sampling.noise import ImageNoise
from maskalign.teachers import load_teacher, load_teacher_like
from maskalign.teachers.tokens import project_class_token, standardize_class_token

SEED = 20_260_608


class ClassTokens(NamedTuple):
    """The `class_token` entries of a teacher in two manifests, each None if it does not exist.

    stored: entry of the held-out data, which describes how the class tokens are stored; trained: entry of the training
    data, which describes the class tokens that the model expects.
    """

    stored: Optional[dict]
    trained: Optional[dict]

    def as_trained(self, values):
        """Stored class tokens (b, D), standardized with the training data's statistics instead of their own."""
        if self.stored is None or self.trained is None or self.stored["kind"] != "mean":
            return values
        if all(self.stored[key] == self.trained[key] for key in ("mean", "std")):
            return values
        mean, std = (torch.tensor(self.stored[key], device=values.device) for key in ("mean", "std"))
        return standardize_class_token(values * std + mean, self.trained["mean"], self.trained["std"])


class TeacherTokens(NamedTuple):
    """The source of a teacher's tokens for held-out images.

    name: of the teacher; network: the network that computes the tokens, None if they are stored in the shards; grid: of
    the tokens; class_tokens: `ClassTokens` if class tokens are needed too, else None.
    """

    name: str
    network: object
    grid: tuple
    class_tokens: Optional[ClassTokens] = None


def choose_teachers(names, training, held_out, *, normalize="none", weights=None, device="cpu", class_tokens=False):
    """Choose how to get the teachers' tokens of held-out images for a run.

    Stored tokens are used if they have the same normalization as those of the training data; otherwise the teacher is
    run.

    Args:
        names: the run's teachers.
        training: `Manifest` of the training data, None if it cannot be read.
        held_out: `Manifest` of the held-out data.
        normalize, weights: as in the run's settings, for teachers that are in neither manifest.
        device: where teachers are run.
        class_tokens: True if the class tokens are needed too, for a model that denoises one.

    Returns:
        list of TeacherTokens.

    Raises:
        UsageError: the held-out data set has neither the stored tokens of a teacher nor images.
    """
    chosen = []
    for name in names:
        there = held_out.teachers.get(name)
        entry = (training.teachers.get(name) if training is not None else None) or there
        keys = ("normalize", "mean", "grid")
        stored, trained = ((known or {}).get("class_token") for known in (there, entry))
        complete = there is not None and (stored is not None or not class_tokens)
        if complete and all(there.get(key) == entry.get(key) for key in keys):
            own = ClassTokens(stored, trained) if class_tokens else None
            chosen.append(TeacherTokens(name, None, tuple(there["grid"]), own))
            continue
        if held_out.image_format is None:
            if there is not None and not complete:
                raise UsageError(f"{held_out.root}: {no_class_tokens(name, held_out.root)}")
            raise UsageError(f"teacher {name}: the held-out data set has neither its features nor images")
        own = dict(weights=weights, image_size=held_out.resolution, device=device)
        network = load_teacher_like(name, entry, **own) if entry else load_teacher(name, normalize=normalize, **own)
        if class_tokens:
            network.check_class_statistics()
        chosen.append(TeacherTokens(name, network, network.grid, ClassTokens(None, trained) if class_tokens else None))
    return chosen


def teachers_of(names, config, class_dim):
    """The teachers that are needed for a model's held-out losses; the first one provides the class token.

    Args:
        names: the teachers that the model was aligned with.
        config: `Config` of the run; None if it is not known.
        class_dim: width of the model's class token, or None.

    Returns:
        (names, class_components), the arguments of `HeldOut`.

    Raises:
        UsageError: the teacher of the class token is not known.
    """
    if class_dim is None:
        return list(names), None
    if not names and config is not None:  # no alignment, but there may be a class token
        names = parse_teachers(config.teacher.names)[:1]
    if not names:
        raise UsageError("the teacher of the model's class token is not known; omit the losses: --held-out-images 0")
    return list(names), None if config is None else config.model.class_token_dim


class HeldOut:
    """Held-out images for `losses_by_time`. They are read again at every pass.

    Args:
        path: the data set.
        count: number of images; 0 for all.
        teachers: list of `TeacherTokens`; () for the velocity loss alone.
        batch_size: images per batch.
        class_components: number of principal components of the first teacher's class token that the model denoises;
            None for the class token itself.
    """

    def __init__(self, path, count, teachers=(), batch_size=64, class_components=None):
        self.path, self.teachers, self.batch_size = path, list(teachers), batch_size
        self.class_components = class_components
        self.manifest = Manifest.load(path)
        available = self.manifest.num_samples
        self.count = min(count, available) if count else available

    def batches(self, device="cpu"):
        """Yield (first number, x (b, C, H, W) float32, labels (b,), [(tokens, grid) per teacher]).

        With class tokens it is (tokens, grid, class token (b, Dz) float32) per teacher.
        """
        latent = self.manifest.latent
        cached = [teacher for teacher in self.teachers if teacher.network is None]
        fields = [teacher.name for teacher in cached]
        fields += [class_field(teacher.name) for teacher in cached if teacher.class_tokens is not None]
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
            tokens = [self._tokens(teacher, batch, rows, images, device) for teacher in self.teachers]
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

    @staticmethod
    def _tokens(teacher, batch, rows, images, device):
        """(tokens, grid) of a teacher, or (tokens, grid, class token)."""
        name, network, grid, class_tokens = teacher
        if class_tokens is None:
            return (batch[name][rows].to(device) if network is None else network(images)), grid
        if network is not None:
            tokens, values = network.tokens_and_class(images)
            return tokens, grid, values
        values = batch[class_field(name)][rows].to(device).float()
        return batch[name][rows].to(device), grid, class_tokens.as_trained(values)

    def class_token(self, teachers):
        """The class token (b, class_dim) that the model denoises; None if no class tokens are read.

        Args:
            teachers: the list of teachers from `batches`.
        """
        if not self.teachers or self.teachers[0].class_tokens is None:
            return None
        return project_class_token(teachers[0][2], self.teachers[0].class_tokens.trained, self.class_components)


@torch.no_grad()
def losses_by_time(model, held_out, *, bins=10, path="linear", on_images=None):
    """Velocity loss and alignment cosine of a model in equal bins of the time in [0, 1].

    Args:
        model: a `SiT`, with the weights to measure.
        held_out: `HeldOut`.
        bins: number of bins.
        path: the interpolant's path.
        on_images: called with the number of images of every batch.

    Returns:
        dict: `velocity_loss` (mean squared error over all elements); `cosine` (mean over teachers) if the model has
        projectors and teachers are given; and `class_velocity_loss` if the model has a class token. Each is a list with
        a number per bin. The means over the bins estimate the means over uniform times.
    """
    device = next(model.parameters()).device
    interpolant, sums, count = Interpolant(path), {}, 0
    with evaluating(model):
        for first, x, labels, teachers in held_out.batches(device):
            numbers = range(first, first + len(x))
            noise = ImageNoise(SEED, numbers, x.shape[1:], device).draw()
            normal = ImageNoise(SEED + 1, numbers, (1,)).draw(torch.float64).flatten()
            place = torch.special.ndtr(normal).to(device)  # uniform in (0, 1)
            class_token, class_noise = held_out.class_token(teachers), None
            if class_token is not None:
                class_noise = ImageNoise(SEED + 3, numbers, class_token.shape[1:], device).draw()
            for index in range(bins):
                t = ((index + place) / bins).float()
                part = velocity_and_cosine(model, x, noise, t, labels, teachers, interpolant, class_token, class_noise)
                found = {"velocity_loss": part.velocity_loss}
                if part.cosines:
                    found["cosine"] = torch.stack(part.cosines).mean(dim=0)
                if part.class_velocity_loss is not None:
                    found["class_velocity_loss"] = part.class_velocity_loss
                for name, values in found.items():
                    sums.setdefault(name, [0.0] * bins)[index] += float(values.sum())
            count += len(x)
            if on_images:
                on_images(len(x))
    return {name: [value / count for value in values] for name, values in sums.items()}


def bin_names(bins):
    """Names of the bins of time: 0.0-0.1, 0.1-0.2, ..."""
    digits = max(1, len(f"{1 / bins:.6g}") - 2) if bins > 1 else 1
    return [f"{k / bins:.{min(digits, 4)}f}-{(k + 1) / bins:.{min(digits, 4)}f}" for k in range(bins)]
