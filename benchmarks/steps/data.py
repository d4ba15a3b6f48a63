"""The batches of `benchmarks.steps`: from memory or through the loader, with cached or computed teacher features."""

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Callable, List, NamedTuple, Optional

import numpy as np
import torch

from maskalign.config.teacher_names import class_field
from maskalign.data import ShardStream
from maskalign.data.format.manifest import Manifest, class_member
from maskalign.data.format.tar_shards import shard_name, write_shard
from maskalign.objective.flow_matching import sample_posterior
from maskalign.teachers import load_teacher, quantize_rows, resample_tokens

LATENT, CLASSES, TEACHER_DIM = (4, 32, 32), 1000, 768
SCALE = 0.18215
IMAGE_SIDE = 256


class Batch(NamedTuple):
    """A batch. inputs: latents, or moments if `prepare` converts them to latents; teachers: a list of (b, N, Dz), or of
    (b, 1 + N, Dz) with a class token; class_token: (b, Dz) float32, or None.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    teachers: List[torch.Tensor]
    prepare: Optional[Callable] = None
    class_token: Optional[torch.Tensor] = None


class Batches:
    """Makes the batch of a step.

    Args:
        data: `memory` (the same random latents every step, nothing is read) or `shards` (moments and int8 features in
            the ImageNet layout, read by the training stream in this process).
        teacher: `cached`, or `online:NAME`, which runs this encoder with random weights on random 256 px images in
            every step.
        batch_size, device: settings of the run.
        grid: (rows, columns) of the student's tokens.
        folder: folder of the shards, see `write_shards`; None for memory.
        aligned: False for recipes without a teacher.
        class_token: True if the batch includes the teacher's class token.

    Raises:
        UsageError: the class token of an online teacher needs the statistics of a data set.
    """

    def __init__(self, data, teacher, batch_size, device, grid, folder=None, aligned=True, class_token=False):
        self.device, self.grid, self.aligned, self.with_class = device, grid, aligned, class_token
        generator = torch.Generator().manual_seed(0)
        tokens = grid[0] * grid[1]
        self.inputs = torch.randn(batch_size, *LATENT, generator=generator).to(device)
        self.labels = torch.randint(0, CLASSES, (batch_size,), generator=generator).to(device)
        self.features = torch.randn(batch_size, tokens, TEACHER_DIM, generator=generator).to(device)
        self.class_token = torch.randn(batch_size, TEACHER_DIM, generator=generator).to(device)
        self.encoder, self.dim = None, TEACHER_DIM
        if aligned and teacher != "cached":
            name = teacher.removeprefix("online:")
            self.encoder = load_teacher(name, weights="random", image_size=IMAGE_SIDE, device=device)
            self.dim = self.encoder.dim
            if class_token:
                self.encoder.check_class_statistics()
            shape = (batch_size, 3, IMAGE_SIDE, IMAGE_SIDE)
            self.images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(device)
        self.stream = None
        if data == "shards":
            cached = ["cached", class_field("cached")] if class_token else ["cached"]
            fields = ["moments", *cached] if aligned and self.encoder is None else ["moments"]
            self.stream = iter(ShardStream(str(folder), batch_size, fields=fields, streams=1))

    @property
    def dims(self):
        """Widths of the teachers, for the model."""
        return [self.dim] if self.aligned else []

    @property
    def class_dim(self):
        """Width of the class token, for the model; None without one."""
        return self.dim if self.with_class else None

    @property
    def latent(self):
        """The scale and bias of latents as in a manifest; None if the inputs are latents."""
        return None if self.stream is None else {"scale": SCALE, "bias": 0.0}

    def __call__(self, part=None):
        """The next `Batch`; `part` is a function from `data` or `teacher` to a context that times this part."""
        part = part or (lambda name: nullcontext())
        with part("data"):
            inputs, labels, features, prepare = self.inputs, self.labels, self.features, None
            values = self.class_token
            if self.stream is not None:
                read = next(self.stream)
                inputs, labels = (read[name].to(self.device, non_blocking=True) for name in ("moments", "label"))
                features, prepare = read.get("cached"), moments_to_latents
                features = None if features is None else features.to(self.device, non_blocking=True)
                if self.with_class and self.encoder is None:
                    values = read[class_field("cached")].to(self.device, non_blocking=True).float()
        teachers = []
        if self.aligned:
            with part("teacher"), torch.no_grad():
                if self.encoder is not None and self.with_class:
                    features, values = self.encoder.tokens_and_class(self.images)
                elif self.encoder is not None:
                    features = self.encoder(self.images)
                if self.encoder is not None:
                    features = resample_tokens(features, self.encoder.grid, self.grid)
                teachers = [with_class_row(features, values) if self.with_class else features]
        return Batch(inputs, labels, teachers, prepare, values if self.with_class else None)


def with_class_row(rows, values):
    """Teacher rows (b, N, Dz), floating point or int8, with the class token (b, Dz) as row 0, as in `Features`."""
    first = quantize_rows(values, check=False) if rows.dtype == torch.int8 else values.to(rows.dtype)
    return torch.cat([first.unsqueeze(1), rows], dim=1)


def moments_to_latents(moments, noise):
    return sample_posterior(moments.float(), noise, SCALE)


def write_shards(folder, grid, samples):
    """Write a data set in the ImageNet layout: random float16 moments, int8 features on the student's grid, classes."""
    rng, tokens, shards = np.random.default_rng(0), grid[0] * grid[1], []

    def members(number):
        moments = np.abs(rng.standard_normal((2 * LATENT[0], *LATENT[1:]))).astype(np.float16)
        features = rng.integers(-127, 128, (tokens, TEACHER_DIM), dtype=np.int8)
        label = str(number % CLASSES).encode()
        values = rng.standard_normal(TEACHER_DIM).astype(np.float16)
        features = {"cached.npy": npy(features), class_member("cached"): npy(values)}
        return {"cls": label, "moments.npy": npy(moments), **features}

    for number, first in enumerate(range(0, samples, 64)):
        content = ((f"{k:08d}", members(k)) for k in range(first, min(first + 64, samples)))
        shards.append(write_shard(str(Path(folder, shard_name(number))), content))
    teacher = {"tokens": tokens, "dim": TEACHER_DIM, "grid": list(grid), "dtype": "int8", "normalize": "none"}
    teacher["class_token"] = {"dim": TEACHER_DIM, "dtype": "float16", "kind": "prefix"}
    shape = [2 * LATENT[0], *LATENT[1:]]
    Manifest(
        num_samples=samples,
        resolution=IMAGE_SIDE,
        class_names=[str(k) for k in range(CLASSES)],
        shards=shards,
        image_format=None,
        latent={"scale": SCALE, "bias": 0.0, "shape": shape, "dtype": "float16", "name": "random"},
        teachers={"cached": teacher},
        source="benchmark",
    ).save(folder)
    return folder


def npy(array):
    """The bytes of a .npy file."""
    with tempfile.SpooledTemporaryFile() as file:
        np.save(file, array)
        file.seek(0)
        return file.read()
