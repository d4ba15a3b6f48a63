"""Noise that belongs to an image, not to a batch: the same for any batch size and any number of processes."""

import hashlib

import torch


def _hash(key):
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def image_seed(seed, index):
    """A seed for one image, in [0, 2^32); for one `seed`, different indices below 2^32 never share it.

    (torch's generator for the CPU uses 32 bits of a seed: a plain hash would give two of 50,000 images the same noise
    in one set of four.)
    """
    return (_hash(f"noise/{seed}") ^ (index * 0x9E3779B1)) & 0xFFFFFFFF


class ImageNoise:
    """A stream of standard normal noise for every image: its starting noise first, then one draw per SDE step.

    Drawn on the CPU, so that an index gives the same picture on every device.

    Args:
        seed: the seed of the whole set.
        indices: the images' indices in the set.
        shape: (C, H, W) of one image.
        device: where the draws go.
    """

    def __init__(self, seed, indices, shape, device="cpu"):
        self.shape = tuple(shape)
        self.device = device
        self.generators = [torch.Generator().manual_seed(image_seed(seed, int(index))) for index in indices]

    def draw(self, dtype=torch.float32):
        """(B, C, H, W), the next draw of every image; drawn in float64 whatever the dtype."""
        draws = [torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators]
        if not draws:
            return torch.empty(0, *self.shape, dtype=dtype, device=self.device)
        return torch.stack(draws).to(device=self.device, dtype=dtype)

    def __call__(self, x):
        """The next draw in x's dtype: the `randn` of `euler_maruyama`."""
        return self.draw(x.dtype)


def image_labels(seed, indices, num_classes):
    """A label per image, uniform over the classes, that depends on (seed, index) alone.

    Returns:
        (B,) int64.
    """
    return torch.tensor([_hash(f"label/{seed}/{int(index)}") % num_classes for index in indices], dtype=torch.int64)
