"""Features of pictures for the distances: one vector per picture from a frozen network.

dinov2-*              the class token, prepared as in the field's FDD (arXiv 2306.04675, whose network is dinov2-l):
                      bicubic with antialias to 224, rounded to bytes, ImageNet normalisation
efficientnet-lite0    the mean over the tokens
timm:MODEL            what timm itself pools before its classifier
"""

import hashlib

import torch
from torch import nn

from maskalign.errors import UsageError
from maskalign.teachers import load_teacher
from maskalign.teachers.encoders import Dinov2, TimmEncoder

CPU_CHUNK = 4  # as in teachers.teacher


def digest_of(module, words):
    """16 hex digits of some words and of every tensor in a module's state."""
    digest = hashlib.sha256(words.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Features(nn.Module):
    """A teacher as a map from pictures to vectors.

    Attributes:
        name: the teacher's; dim: length of a vector.
    """

    VERSION = 1  # of what is computed; part of the fingerprint

    def __init__(self, teacher, title=None):
        super().__init__()
        self.name = teacher.name
        self.encoder = teacher.encoder
        self.title = title or (f"FDD, {self.name}" if self.name.startswith("dinov2") else self.name)
        self.dim = teacher.encoder.network.num_features if isinstance(self.encoder, TimmEncoder) else teacher.dim

    def fingerprint(self):
        """16 hex digits that change with the weights, the preprocessing and the pooling."""
        return digest_of(self.encoder, f"{type(self.encoder).__name__} {self.name} {self.VERSION}")

    @torch.no_grad()
    def forward(self, pictures):
        """Features of pictures (B, 3, H, W) uint8: (B, dim) float32 on the CPU.

        Raises:
            UsageError: features that are not finite, so weights that cannot be right.
        """
        device = next(self.encoder.parameters()).device
        chunk = CPU_CHUNK if device.type == "cpu" else max(1, len(pictures))
        with torch.autocast(device.type, enabled=False):
            parts = [self._pooled(part.to(device, non_blocking=True)) for part in pictures.split(chunk)]
        features = torch.cat(parts).float().cpu()
        if not features.isfinite().all():
            raise UsageError(f"teacher {self.name}: its features are not finite; check its weights")
        return features

    def _pooled(self, pictures):
        encoder = self.encoder
        if isinstance(encoder, Dinov2):
            side = 14 * encoder.grid[0]
            pixels = encoder.resized(pictures, (side, side)).round()
            return encoder.network.forward_features(encoder.normalised(pixels).to(encoder.dtype))[:, 0]
        if isinstance(encoder, TimmEncoder):
            out = encoder.network.forward_features(encoder.preprocess(pictures).to(encoder.dtype))
            return encoder.network.forward_head(out, pre_logits=True).flatten(1)
        return encoder(pictures).mean(dim=1)


def load_features(name, weights=None, device="cpu"):
    """The features of a teacher.

    Args:
        name, weights: as for `load_teacher`.

    Raises:
        UsageError: no such teacher, or no weights.
    """
    features = Features(load_teacher(name, weights=weights, image_size=256)).to(device)
    return features.requires_grad_(False).eval()
