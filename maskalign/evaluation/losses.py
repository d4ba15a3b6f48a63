"""Velocity loss and alignment cosine of a model on images that are given, image by image."""

import torch

from maskalign.teachers.tokens import resample_tokens


@torch.no_grad()
def velocity_and_cosine(model, x, noise, t, labels, teachers, interpolant):
    """Full-token velocity loss and alignment cosine of a batch.

    Args:
        model: a `SiT` in eval mode, or anything that is called like one.
        x, noise: (b, C, H, W) clean latents or pixels, and the noise.
        t: (b,) times in [0, 1].
        labels: (b,) int64.
        teachers: one (tokens (b, N, Dz), their grid) per teacher, any dtype; () where there are none.
        interpolant: `Interpolant`.

    Returns:
        (loss, cosines): (b,) float64, the mean squared error over all elements of an image; and one (b,) float64 per
        teacher, the mean over its tokens, where the model has projectors and the teachers are given.
    """
    noised, velocity = interpolant.interpolate(x, noise, t)
    out = model(noised, t, labels)
    loss = (out.velocity - velocity).double().square().flatten(1).mean(dim=1)
    cosines = []
    for aligned, (tokens, grid) in zip(out.aligned or (), teachers, strict=False):
        z = resample_tokens(tokens.float(), grid, model.grid)
        cosines.append(torch.cosine_similarity(aligned.double(), z.double(), dim=-1).mean(dim=1))
    return loss, cosines
