"""Compute the features of a shard's samples: teacher rows, class tokens and VAE moments.

Batches contain samples of one shard and have a fixed size, so the bytes do not depend on interruptions or on the
process that computes them.
"""

import io
import tarfile
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from maskalign.data.build.images import BadImage, decode_image
from maskalign.data.build.recipe import weights_label
from maskalign.data.build.vae import latent_entry, load_vae, vae_moments
from maskalign.data.format.manifest import class_member, is_url, teacher_member
from maskalign.data.format.tar_shards import HashingReader, read_shard
from maskalign.errors import RunError, one_line
from maskalign.teachers import load_teacher, quantize_rows, standardize_class_token
from maskalign.teachers.tokens import normalize_tokens

MEAN_IMAGES = 256
MEAN_SHARDS = 16


class FeatureMaker:
    """The networks of a recipe on one device, and threads that decode images (on CPUs they also run the networks).

    Use it as a context manager around `samples` and `estimate_statistics`.

    Attributes:
        statistics: {teacher: {"mean", "class_mean", "class_std"}} of `estimate_statistics`, where it is needed.
    """

    def __init__(self, recipe, manifest, device, threads):
        self.recipe, self.manifest, self.device = recipe, manifest, torch.device(device)
        own = {"image_size": manifest.resolution, "grid": recipe.grid, "device": self.device}
        # Tokens are normalized in this class, because the statistics are known only after a first pass.
        self.teachers = [load_teacher(wanted.name, weights=wanted.weights, **own) for wanted in recipe.teachers]
        self.vae = load_vae(recipe.latents, device=self.device) if recipe.latents else None
        self.statistics = {}
        self.threads = max(1, threads)

    def __enter__(self):
        # One thread per batch instead of many per layer. Threads then do not wait for each other at barriers, which is
        # slow where other programs run too, and sums do not depend on the number of cores.
        self.torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(self.threads, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *error):
        self.pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self.torch_threads)

    def entries(self):
        """(latent entry or None, {teacher: entry}) for the manifest."""
        recipe = self.recipe
        latent = latent_entry(self.vae, recipe.latents, self.manifest.resolution) if self.vae else None
        teachers = {}
        for teacher, wanted in zip(self.teachers, recipe.teachers, strict=True):
            found = self.statistics.get(wanted.name, {})
            if wanted.rows:
                entry = {"tokens": teacher.tokens, "dim": teacher.dim, "grid": list(teacher.grid)}
                entry |= {"dtype": recipe.dtype, "normalize": recipe.normalize}
                entry["weights"] = weights_label(wanted.weights)
                if recipe.grid is not None:
                    entry["resampled"] = True
                if recipe.normalize == "mean" and found:
                    entry["mean"] = found["mean"]
            else:
                entry = dict(self.manifest.teachers[wanted.name])
            if wanted.class_token:
                own = {"dim": teacher.class_dim, "dtype": "float16", "kind": teacher.class_kind}
                if teacher.class_kind == "mean" and found:
                    own |= {"mean": found["class_mean"], "std": found["class_std"]}
                entry["class_token"] = own
            teachers[wanted.name] = entry
        return latent, teachers

    def in_need(self):
        """The teachers that need a first pass, for their mean token or the statistics of their class token."""
        return [
            teacher
            for teacher, wanted in zip(self.teachers, self.recipe.teachers, strict=True)
            if (wanted.rows and self.recipe.normalize == "mean")
            or (wanted.class_token and teacher.class_kind == "mean")
        ]

    def estimate_statistics(self, advance):
        """Estimate statistics over a fixed sample of the data set, for the teachers of `in_need`.

        Args:
            advance: called with the number of images after each batch.

        Returns:
            {teacher: {"mean", "class_mean", "class_std"}}: the mean token, and mean and standard deviation of the class
            token's channels, as lists of floats that are float32 values.
        """
        from maskalign.data.build.class_tokens import channel_statistics, plain_floats

        sums, count = None, 0
        for number, wanted in mean_sample(self.manifest).items():
            samples = (sample for i, sample in enumerate(open_samples(self.manifest, number)) if i in wanted)
            for keys, found in self._computed(islice(samples, len(wanted)), number, self._sums):
                sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
                count += len(keys)
                advance(len(keys))
        found = {}
        for place, teacher in enumerate(self.in_need()):
            tokens, total, squares = sums[3 * place : 3 * place + 3]
            mean, std = channel_statistics(total, squares, count)
            found[teacher.name] = {"mean": plain_floats(tokens / count), "class_mean": mean, "class_std": std}
        return found

    def _sums(self, images):
        """For each teacher of `in_need`, the sums over images of mean tokens, of class tokens, and of their squares."""
        sums = []
        for teacher in self.in_need():
            tokens, values = teacher.encode(images)
            mean, values = teacher.finish(tokens).double().mean(dim=1), values.double()
            sums += [part.sum(dim=0).cpu().numpy() for part in (mean, values, values**2)]
        return sums

    def samples(self, number, advance):
        """Yield the samples of shard `number` with their new members, as (key, {extension: bytes}), in order.

        Args:
            number: the shard's index in the manifest.
            advance: called with the number of images after each batch.

        Raises:
            RunError: the shard is damaged, or a network gives values that are not finite.
        """
        recipe, shard = self.recipe, self.manifest.shards[number]
        count = 0
        for batch, found in self._computed(open_samples(self.manifest, number), number, self._members):
            for i, (key, members) in enumerate(batch):
                kept = {ending: data for ending, data in members.items() if not recipe.replaces(ending)}
                yield key, kept | {ending: found[ending][i] for ending in recipe.endings}
            count += len(batch)
            advance(len(batch))
        if count != shard.num_samples:
            raise RunError(f"shard {shard.name} has {count} samples, its manifest says {shard.num_samples}{CHECK_HINT}")

    def _computed(self, samples, number, function):
        """Yield (batch of samples, function(images)) in order, with a few batches in progress in the threads."""
        shard = self.manifest.shards[number].name
        on_cpu = self.device.type == "cpu"

        def work(batch):
            images = torch.from_numpy(np.stack([self._image(shard, key, members) for key, members in batch]))
            return function(images) if on_cpu else images.pin_memory()

        waiting = deque()
        samples = iter(samples)
        while batch := list(islice(samples, self.recipe.batch_size)):
            waiting.append((batch, self.pool.submit(work, batch)))
            if len(waiting) > 2 * self.threads:
                yield self._result(*waiting.popleft(), function)
        while waiting:
            yield self._result(*waiting.popleft(), function)

    def _result(self, batch, future, function):
        result = future.result()
        if self.device.type != "cpu":
            result = function(result.to(self.device, non_blocking=True))
        return batch, result

    def _image(self, shard, key, members):
        ending = self.manifest.image_format
        if ending not in members:
            raise RunError(f"shard {shard}: sample {key} has no image {key}.{ending}{CHECK_HINT}")
        try:
            image = np.asarray(decode_image(members[ending]))
        except BadImage as error:
            raise RunError(f"shard {shard}: image {key}.{ending}: {error}{CHECK_HINT}") from None
        side = self.manifest.resolution
        if image.shape != (side, side, 3):
            size = f"{image.shape[1]}x{image.shape[0]}"
            raise RunError(f"shard {shard}: image {key}.{ending} has {size} pixels, expected {side}x{side}{CHECK_HINT}")
        return image.transpose(2, 0, 1)

    def _members(self, images):
        """{extension: list of .npy bytes, one per image} for images (B, 3, H, W) uint8."""
        found = self._arrays(images)
        if self.recipe.hflip:
            found |= {f"flip.{ending}": arrays for ending, arrays in self._arrays(images.flip(-1)).items()}
        return {ending: [npy_bytes(array) for array in arrays] for ending, arrays in found.items()}

    def _arrays(self, images):
        recipe, found = self.recipe, {}
        if self.vae is not None:
            found["moments.npy"] = to_float16(vae_moments(self.vae, images), f"vae {recipe.latents}")
        for teacher, wanted in zip(self.teachers, recipe.teachers, strict=True):
            tokens, values = teacher.encode(images)
            if wanted.rows:
                found[f"{teacher_member(teacher.name)}.npy"] = self._rows(teacher, tokens)
            if wanted.class_token:
                if teacher.class_kind == "mean":
                    own = self.statistics[teacher.name]
                    values = standardize_class_token(values, own["class_mean"], own["class_std"])
                found[class_member(teacher.name)] = to_float16(values, f"teacher {teacher.name}")
        return {ending: tensor.cpu().numpy() for ending, tensor in found.items()}

    def _rows(self, teacher, tokens):
        recipe, mean = self.recipe, None
        if recipe.normalize == "mean":
            mean = torch.tensor(self.statistics[teacher.name]["mean"], dtype=torch.float32)
        z = normalize_tokens(teacher.finish(tokens), recipe.normalize, mean)
        try:
            return quantize_rows(z) if recipe.dtype == "int8" else to_float16(z, f"teacher {teacher.name}")
        except ValueError as error:
            raise RunError(f"teacher {teacher.name}: {error}; are its weights damaged?") from None


CHECK_HINT = "; find damaged shards with: maskalign data check"


def open_samples(manifest, number):
    """Yield (key, members) of a shard; raises RunError at its end if its checksum is not that of the manifest."""
    shard, path = manifest.shards[number], manifest.shard_path(number)
    try:
        with _open(path) as raw:
            file = HashingReader(raw)
            yield from read_shard(file)
            while file.read(1 << 20):  # the tar may end before the file; the checksum is of the whole file
                continue
    except (OSError, tarfile.TarError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise RunError(f"cannot read shard {path}: {reason}{CHECK_HINT}") from None
    if file.sha256.hexdigest() != shard.sha256:
        raise RunError(f"shard {path} does not have the checksum of its manifest{CHECK_HINT}")


def _open(path):
    if not is_url(path):
        return open(path, "rb")
    import fsspec  # slow to import

    return fsspec.open(path, "rb").open()


def mean_sample(manifest, images=MEAN_IMAGES, shards=MEAN_SHARDS):
    """The samples from which statistics are estimated, a fixed choice: {shard number: set of positions in it}.

    These are evenly spaced samples of up to `shards` evenly spaced shards, so the choice suits sorted data too.
    """
    filled = [number for number, shard in enumerate(manifest.shards) if shard.num_samples]
    count = min(shards, len(filled))
    chosen = [filled[i * len(filled) // count] for i in range(count)]
    share = -(-images // max(1, count))
    sample = {}
    for number in chosen:
        available = manifest.shards[number].num_samples
        some = min(share, available)
        sample[number] = {i * available // some for i in range(some)}
    return sample


def to_float16(values, what):
    """Convert a tensor to float16; raises RunError where a value does not fit. `what` is for the message."""
    half = values.to(torch.float16)
    if not torch.isfinite(half).all():
        raise RunError(f"{what}: values that are not finite in float16; are its weights damaged?")
    return half


def npy_bytes(array):
    """The bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
