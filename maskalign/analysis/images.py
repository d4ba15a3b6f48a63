"""The images of an analysis. They are read once, with labels and teacher features, and noised by keyed draws."""

from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Optional

import torch

from maskalign.config.teacher_names import no_class_tokens
from maskalign.data import ShardStream
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError
from maskalign.objective.draws import draw
from maskalign.objective.flow_matching import sample_posterior
from maskalign.objective.interpolant import Interpolant
from maskalign.teachers.features import Features


class Noised(NamedTuple):
    """One noised batch at one time.

    x_t: (b, C, H, W); t: (b,); labels: (b,) int64; teachers: list of (b, N, Dz), or (b, 1 + N, Dz) for a model with a
    class token; subset: (b, K) int64; align_subset: (b, n) int64 or None; class_token: (b, class_dim), noised, or None
    for a model without one.
    """

    x_t: torch.Tensor
    t: torch.Tensor
    labels: torch.Tensor
    teachers: list
    subset: torch.Tensor
    align_subset: Optional[torch.Tensor]
    class_token: Optional[torch.Tensor] = None


class Images:
    """The first images of a data set in the order of a seed, in host memory.

    Args:
        path: folder or URL prefix of the data set.
        subject: a `Subject`; its input size, grid and teachers are used.
        count: number of images; if the data set has fewer, all of them.
        teachers: names of the teachers, if the checkpoint does not contain them.
        batch_size: images per batch while reading.
        seed: seed of the order of the images.
        device: where features are computed, and where `noised` batches are.
        progress: called with the number of images after each batch.

    Attributes:
        count: number of images.
        names: names of the teachers.
        features: one (count, N, Dz) per teacher; (count, 1 + N, Dz), the class token first, if the model has one.
        class_tokens: (count, class_dim) float32, or None.

    Raises:
        UsageError: the data set does not fit the model.
    """

    def __init__(self, path, subject, count, *, teachers=(), batch_size=32, seed=0, device="cpu", progress=None):
        self.manifest = manifest = Manifest.load(str(path))
        self.device, model = torch.device(device), subject.model
        self._check(path, model, count)
        self.names = tuple(teachers) or subject.teachers or tuple(manifest.teachers)
        sources = [(name, self._is_cached(path, name)) for name in self.names]
        if model.class_dim is not None:
            sources = self._class_sources(path, subject, sources)
        config = replace(subject.config)
        class_token = None
        if model.class_dim is not None and sources:
            class_token = sources[0]
            config.model = replace(config.model, class_token_dim=self._components(path, subject, sources))
        features = Features(config, manifest, sources, model.grid, self.device, class_token=class_token)
        if tuple(features.dims) != model.teacher_dims:
            raise UsageError(
                f"{path}: the teachers {', '.join(self.names) or '(none)'} have widths {features.dims}, the model's "
                f"projectors {list(model.teacher_dims)}; name the teachers that it was trained with: --teacher NAME,..."
            )
        if features.class_dim != model.class_dim:
            raise UsageError(
                f"{path}: the class token of {self.names[0]} has {features.class_dim} numbers, the model's "
                f"{model.class_dim}; give --data the data set of its training"
            )
        self._read(path, features, min(count, manifest.num_samples), batch_size, seed, progress)

    def _check(self, path, model, count):
        latent, manifest = self.manifest.latent, self.manifest
        if latent is not None:
            size, channels = latent["shape"][1], latent["shape"][0] // 2
        else:
            size, channels = manifest.resolution, manifest.channels
        if (size, channels) != (model.input_size, model.in_channels):
            raise UsageError(
                f"{path}: has inputs of {channels} x {size} x {size}, the model was trained on {model.in_channels} x "
                f"{model.input_size} x {model.input_size}; give --data the data set of its training"
            )
        if len(manifest.class_names) > model.num_classes:
            raise UsageError(
                f"{path}: has {len(manifest.class_names)} classes, the model {model.num_classes}; give --data the data "
                "set of its training"
            )
        if manifest.num_samples < 4:
            raise UsageError(f"{path}: has {manifest.num_samples} images; at least 4 are needed, to compare halves")

    def _is_cached(self, path, name):
        if name not in self.manifest.teachers and self.manifest.image_format is None:
            raise UsageError(
                f"{path}: has no features of {name!r}, and no images to compute them from; run maskalign data encode "
                f"--data {path} --teacher {name} where the images are"
            )
        return name in self.manifest.teachers

    def _class_sources(self, path, subject, sources):
        """The sources, where a teacher is computed if its stored class tokens have other statistics than the run's.

        Class tokens that are averages of rows are standardized and projected with statistics of the training data. If
        that data set cannot be read, the statistics of the given data set are used.

        Raises:
            UsageError: the class tokens are missing or do not fit the run, and there are no images to compute them.
        """
        where, training = subject.config.data.path, None
        with suppress(UsageError, OSError):
            training = Manifest.load(where if isinstance(where, str) else next(iter(where)))
        found = []
        for name, cached in sources:
            own = self.manifest.teachers.get(name, {}).get("class_token")
            if cached and own is None:
                raise UsageError(f"{path}: {no_class_tokens(name, path)}")
            trained = training.teachers.get(name) if training is not None and subject.step is not None else None
            if trained is not None and "class_token" in trained and not self._fits(own, trained, subject):
                if self.manifest.image_format is None:
                    raise UsageError(
                        f"{path}: its class tokens of {name!r} have other statistics than those of the run's data set, "
                        "and there are no images to compute them from; give --data the data set of its training"
                    )
                self.manifest.teachers[name], cached = trained, False
            found.append((name, cached))
        return found

    @staticmethod
    def _fits(own, trained, subject):
        """True if a data set's class tokens have the same statistics as those that the run was trained on."""
        keys = ["mean", "std"] if trained["class_token"]["kind"] == "mean" else []
        keys += ["components"] if subject.config.model.class_token_dim is not None else []
        return own is not None and all(own.get(key) == trained["class_token"].get(key) for key in keys)

    def _components(self, path, subject, sources):
        """Number of principal components of the class token that the model denoises; None for the token itself.

        Raises:
            UsageError: the data set has fewer components than the model needs.
        """
        name, wanted = sources[0][0], subject.model.class_dim
        entry = self.manifest.teachers.get(name, {}).get("class_token", {})
        # A file of weights has no settings: a narrower class token means principal components.
        if subject.config.model.class_token_dim is None and entry.get("dim", wanted) == wanted:
            return None
        stored = len(entry.get("components", {}).get("basis", ()))
        if stored < wanted:
            raise UsageError(
                f"{path}: the model denoises {wanted} principal components of the class token of {name!r}, and the "
                f"data set has {stored}; give --data the data set of its training"
            )
        return wanted

    def _read(self, path, features, count, batch_size, seed, progress):
        fields = list(features.fields)
        fields += ["moments"] if self.manifest.latent is not None else []
        fields += ["image"] if self.manifest.latent is None or features.needs_images else []
        batch_size = min(batch_size, count)
        parts = []
        for batch in ShardStream(str(path), batch_size, seed=seed, epochs=1, streams=1, fields=fields):
            inputs = batch["moments"].float() if self.manifest.latent else batch["image"].float() / 127.5 - 1
            # These are copied because the stream reuses a batch's memory for later batches.
            teachers, token = features(batch)
            row = (inputs, batch["label"], *teachers, *([] if token is None else [token]))
            parts.append([x.cpu().clone() for x in row])
            if progress is not None:
                progress(len(batch["label"]))
            if sum(len(part[1]) for part in parts) >= count:
                break
        self.inputs, self.labels, *self.features = (torch.cat(column)[:count] for column in zip(*parts, strict=True))
        self.class_tokens = self.features.pop() if features.class_dim is not None else None
        self.count = len(self.labels)

    def draws(self, subject, keep_ratio, number, rows, seed):
        """The keyed draws `number` of the images `rows` (a slice), see `objective.draws`; labels are kept.

        They depend only on the seed, the number and the image's position, so all checkpoints and devices have the same.
        """
        model, method = subject.model, subject.config.method
        keep = subject.kept(keep_ratio)
        return draw(
            seed,
            number,
            rows.start,
            rows.stop - rows.start,
            shape=(model.in_channels, model.input_size, model.input_size),
            grid=model.grid,
            keep=keep,
            align=subject.drawn(keep),
            time=subject.config.objective.time,
            path=subject.config.objective.path,
            label_dropout=0.0,
            subset=method.subset,
            posterior=self.manifest.latent is not None,
            class_dim=model.class_dim,
        )

    def noised(self, subject, draws, rows, time=None):
        """A `Noised` batch on the device, at the given time, or at the drawn times if `time` is None."""
        x = self.inputs[rows]
        if self.manifest.latent is not None:
            x = sample_posterior(x, draws.posterior, self.manifest.latent["scale"], self.manifest.latent["bias"])
        t = draws.time if time is None else torch.full((len(x),), float(time))
        interpolant, class_t = Interpolant(subject.config.objective.path), None
        x_t, _ = interpolant.interpolate(x, draws.noise, t)
        teachers = [z[rows].to(self.device) for z in self.features]
        if self.class_tokens is not None:
            class_t, _ = interpolant.interpolate(self.class_tokens[rows], draws.class_noise, t)
        index = [None if part is None else part.to(self.device) for part in (draws.subset, draws.align_subset, class_t)]
        return Noised(x_t.to(self.device), t.to(self.device), self.labels[rows].to(self.device), teachers, *index)

    def batches(self, size, whole=False):
        """list of slices of `size` images; with `whole`, without a shorter last slice."""
        last = self.count - self.count % size if whole else self.count
        return [slice(begin, min(begin + size, last)) for begin in range(0, last, size)]
