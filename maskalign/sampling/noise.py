"""Noise per image: an image's noise is the same for any batch size and any number of processes."""

import hashlib

import torch

from maskalign.sampling.state import StateLayout


def _hash(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def image_seed(seed, index, kind="noise"):
    """A seed for one image, in [0, 2^32); for one `seed` and `kind`, different indices below 2^32 never share it.

    torch's generator for the CPU uses 32 bits of a seed. With a plain hash, two of 50,000 images would have the same
    noise in one of four sets.
    """
    return (_hash(f"{kind}/{seed}") ^ (index * 0x9E3779B1)) & 0xFFFFFFFF


class ImageNoise:
    """A stream of standard normal noise for every image: first the starting noise, then one draw per SDE step.

    The noise is drawn on the CPU, so that an index has the same noise on every device. The class token has a separate
    generator, so that an image has the same noise in models with and without a class token.

    Args:
        seed: the seed of the whole set.
        indices: the images' indices in the set.
        shape: (C, H, W) of one image.
        device: where the draws go.
        class_dim: width of the class token, for a model that has one.
    """

    def __init__(self, seed, indices, shape, device="cpu", class_dim=None):
        self.layout = StateLayout(tuple(shape), class_dim)
        self.device = device
        indices = [int(index) for index in indices]
        self.image_streams = _generators(seed, indices, "noise")
        self.class_streams = [] if class_dim is None else _generators(seed, indices, "class-noise")

    def draw(self, dtype=torch.float32):
        """The next draw of every image, drawn in float64 and converted to `dtype`.

        Returns:
            (B, C, H, W); with a class token (B, C * H * W + class_dim), see `state.StateLayout`.
        """
        noise = _next(self.image_streams, self.layout.shape)
        if self.layout.class_dim is not None:
            noise = self.layout.pack(noise, _next(self.class_streams, (self.layout.class_dim,)))
        return noise.to(device=self.device, dtype=dtype)

    def __call__(self, x):
        """The next draw in x's dtype: the `randn` of `euler_maruyama`."""
        return self.draw(x.dtype)


def _generators(seed, indices, kind):
    return [torch.Generator().manual_seed(image_seed(seed, index, kind)) for index in indices]


def _next(generators, shape):
    """(B, *shape) float64, one draw from every generator."""
    draws = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(draws) if draws else torch.empty(0, *shape, dtype=torch.float64)


def image_labels(seed, indices, num_classes):
    """A label per image, uniform over the classes, that depends on (seed, index) alone.

    Returns:
        (B,) int64.
    """
    return torch.tensor([_hash(f"label/{seed}/{int(index)}") % num_classes for index in indices], dtype=torch.int64)
