"""The teachers' features of a batch: read from the shards, or computed by frozen encoders."""

from typing import NamedTuple

import torch

from maskalign.config.teacher_names import class_field
from maskalign.teachers import load_teacher, load_teacher_like, quantize_rows, resample_tokens
from maskalign.teachers.tokens import class_projection


class Source(NamedTuple):
    """Where the features of one teacher come from: its network, or the shards where that is None."""

    name: str
    teacher: object
    grid: tuple
    dim: int


class Features:
    """Teacher features of a batch on the student's grid: from the shards, or computed from the images.

    Args:
        config, manifest: of the run.
        teachers: list of (name, cached).
        grid: (rows, columns) of the student's tokens.
        device: torch.device.
        class_token: None, or (name, cached) of the teacher whose class token the model denoises: the first of
            `teachers` where there are some.
        prepare: called with the network of each live teacher, to compile or shard it.

    Attributes:
        sources: a `Source` per teacher; with a class token and no alignment only the one of the class token.
        class_dim: numbers of the class token that the model sees, None where it sees none.

    Raises:
        UsageError: a class token that cannot be computed without statistics of the data set.
    """

    def __init__(self, config, manifest, teachers, grid, device, class_token=None, prepare=None):
        self.grid = grid
        self.device = device
        self.aligned = bool(teachers)
        self.with_class = class_token is not None
        self.sources = []
        weights = config.teacher.weights
        for name, cached in teachers or ([class_token] if self.with_class else []):
            entry = manifest.teachers.get(name)
            if cached:
                self.sources.append(Source(name, None, tuple(entry["grid"]), entry["dim"]))
                continue
            own = dict(weights=weights, image_size=manifest.resolution, device=device)
            if entry is not None:
                teacher = load_teacher_like(name, entry, **own)
            else:
                teacher = load_teacher(name, normalize=config.teacher.normalize, **own)
            if self.with_class:
                teacher.check_class_statistics()
            if prepare is not None:
                prepare(teacher.encoder.network)
            self.sources.append(Source(name, teacher, teacher.grid, teacher.dim))
        self._projection = None
        self.class_dim = self._class_dim(config, manifest) if self.with_class else None

    def _class_dim(self, config, manifest):
        """Numbers of the class token that the model sees; makes the projection to principal components."""
        source, count = self.sources[0], config.model.class_token_dim
        class_token = manifest.teachers.get(source.name, {}).get("class_token", {})
        if count is None:
            return class_token["dim"] if source.teacher is None else source.teacher.class_dim
        self._projection = tuple(part.to(self.device) for part in class_projection(class_token, count))
        return count

    @property
    def dims(self):
        """Width of each aligned teacher's rows."""
        return [source.dim for source in self.sources] if self.aligned else []

    @property
    def fields(self):
        """Names of the fields that the stream must read for the features, without the images."""
        cached = [source.name for source in self.sources if source.teacher is None]
        fields = cached if self.aligned else []
        return fields + [class_field(name) for name in cached if self.with_class]

    @property
    def needs_images(self):
        """Whether some features are computed from the images of a batch."""
        return any(source.teacher is not None for source in self.sources)

    @torch.no_grad()
    def __call__(self, batch):
        """Features of a batch of the stream.

        Returns:
            (teachers, class_token): one (b, N, Dz) per aligned teacher, floating or int8, and with a class token one
            (b, 1 + N, Dz), the class token first; the class token that the model denoises, (b, class_dim) float32 on
            the device, or None.
        """
        teachers, first = [], None
        for source in self.sources:
            z, values = self._of(source, batch)
            first = values if first is None else first
            if not self.aligned:
                continue
            # int8 rows have lost their lengths, so a weighted mean of neighbors would be wrong: resample before
            # storing.
            z = z if source.grid == self.grid else resample_tokens(z.float(), source.grid, self.grid)
            if values is not None:
                # A cosine ignores the length of a row. Cached class tokens are known to be finite.
                row = quantize_rows(values, check=False) if z.dtype == torch.int8 else values.to(z.dtype)
                z = torch.cat([row.unsqueeze(1), z], dim=1)
            teachers.append(z)
        if self._projection is not None:
            mean, matrix = self._projection
            first = (first - mean) @ matrix
        return teachers, first

    def _of(self, source, batch):
        """(rows or None, class token (b, Dz) float32 or None) of one teacher, as they are stored or computed."""
        if source.teacher is None:
            fields = [source.name if self.aligned else None, class_field(source.name) if self.with_class else None]
            z, values = (None if field is None else batch[field].to(self.device, non_blocking=True) for field in fields)
            return z, values if values is None else values.float()
        images = batch["image"].to(self.device, non_blocking=True)
        if not self.with_class:
            return source.teacher(images), None
        if not self.aligned:
            return None, source.teacher.class_token(images)
        return source.teacher.tokens_and_class(images)
