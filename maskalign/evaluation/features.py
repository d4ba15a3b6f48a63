"""Features of images for the distances: one vector per image from a frozen network.

dinov2-*              the class token, as in FDD (arXiv 2306.04675, which uses dinov2-l): bicubic resizing with
                      antialias to 224, rounding to bytes, ImageNet normalization; position embedding as on DINOv2's hub
efficientnet-lite0    the mean over the tokens
timm:MODEL            the pooled features of timm before its classifier
"""

import hashlib

import torch
import torch.nn.functional as F
from torch import nn

from maskalign.config.teacher_names import check_teacher_name
from maskalign.errors import UsageError
from maskalign.teachers import load_teacher
from maskalign.teachers.encoders import IMAGENET_MEAN, IMAGENET_STD, Encoder, TimmEncoder
from maskalign.teachers.hub import dinov2_model
from maskalign.teachers.weights import build_network

CPU_CHUNK = 16  # images per pass; more are not faster on a CPU


class ClassToken(Encoder):
    """DINOv2's class token of an image, computed as in its authors' hub code.

    The teacher `dinov2-*` is different: it follows REPA, which resizes after the normalization and resamples the
    position embedding with timm's function.
    """

    SIDE = 224
    OFFSET = 0.1  # the hub code adds it to the size before it resamples the position embedding

    def __init__(self, teacher, weights):
        network = build_network(dinov2_model(teacher), weights, teacher=teacher, num_classes=0, img_size=518)
        position = network.pos_embed.detach().clone()
        network.set_input_size(img_size=self.SIDE)
        grid = self.SIDE // 14
        old = round((position.shape[1] - 1) ** 0.5)
        maps = position[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
        scale = ((grid + self.OFFSET) / old,) * 2
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic")
        with torch.no_grad():
            network.pos_embed.copy_(torch.cat([position[:, :1], maps.flatten(2).transpose(1, 2)], dim=1))
        super().__init__(network, IMAGENET_MEAN, IMAGENET_STD)
        self.dim = network.num_features

    def forward(self, pictures):
        pixels = self.resized(pictures, (self.SIDE, self.SIDE)).round()
        return self.network.forward_features(self.normalized(pixels).to(self.dtype))[:, 0]


class Pooled(nn.Module):
    """The pooled features before the classifier for timm models; the mean over the tokens for other teachers."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.by_timm = isinstance(encoder, TimmEncoder)
        self.dim = encoder.network.num_features if self.by_timm else encoder.dim

    def forward(self, pictures):
        encoder = self.encoder
        if not self.by_timm:
            return encoder(pictures).mean(dim=1)
        out = encoder.network.forward_features(encoder.preprocess(pictures).to(encoder.dtype))
        return encoder.network.forward_head(out, pre_logits=True).flatten(1)


def module_digest(module, words):
    """A digest of 16 hex digits of the text `words` and of every tensor in a module's state."""
    digest = hashlib.sha256(words.encode())
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class Features(nn.Module):
    """A network that maps images to feature vectors in float32.

    Attributes:
        name: name of the teacher.
        encoder: `ClassToken` or `Pooled`.
        dim: length of a vector.
    """

    VERSION = 1  # version of the computation; part of the fingerprint

    def __init__(self, name, encoder):
        super().__init__()
        self.name, self.encoder, self.dim = name, encoder, encoder.dim

    def fingerprint(self):
        """16 hex digits that change with the weights, the preprocessing and the pooling."""
        return module_digest(self.encoder, f"{type(self.encoder).__name__} {self.name} {self.VERSION}")

    @torch.no_grad()
    def forward(self, pictures):
        """Features of images (B, 3, H, W) uint8: (B, dim) float32 on the CPU.

        Raises:
            UsageError: the features are not finite, which means wrong weights.
        """
        device = next(self.encoder.parameters()).device
        chunk = CPU_CHUNK if device.type == "cpu" else max(1, len(pictures))
        with torch.autocast(device.type, enabled=False):
            parts = [self.encoder(part.to(device, non_blocking=True)) for part in pictures.split(chunk)]
        features = torch.cat(parts).float().cpu()
        if not features.isfinite().all():
            raise UsageError(f"teacher {self.name}: its features are not finite; check its weights")
        return features


def load_features(name, weights=None, device="cpu"):
    """Load the `Features` of a teacher.

    Args:
        name, weights: as for `load_teacher`.
        device: where the network runs.

    Raises:
        UsageError: the teacher does not exist, or its weights cannot be found.
    """
    check_teacher_name(name)
    if name.startswith("dinov2-"):
        encoder = ClassToken(name, str(weights or "hub"))
    else:
        encoder = Pooled(load_teacher(name, weights=weights).encoder)
    return Features(name, encoder).to(device).requires_grad_(False).eval()
