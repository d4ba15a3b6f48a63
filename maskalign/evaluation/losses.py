"""Velocity losses and alignment cosine of a model on a batch, per image."""

from typing import List, NamedTuple, Optional

import torch

from maskalign.models.routing import gather_tokens
from maskalign.teachers.tokens import resample_tokens


class ImageLosses(NamedTuple):
    """The result of `velocity_and_cosine`, (b,) float64 each.

    velocity_loss: the mean squared error over all elements of an image.
    cosines: one per teacher, the mean over its tokens; empty without projectors or teachers.
    class_velocity_loss: the mean squared error over the numbers of the class token; None for a model without one.
    """

    velocity_loss: torch.Tensor
    cosines: List[torch.Tensor]
    class_velocity_loss: Optional[torch.Tensor] = None


@torch.no_grad()
def velocity_and_cosine(model, x, noise, t, labels, teachers, interpolant, class_token=None, class_noise=None):
    """Full-token velocity losses and alignment cosine of a batch.

    A model with a class token is given the noised class token of the image that it denoises, a global feature of the
    true picture. Its velocity loss must not be compared with that of a model without a class token.

    Args:
        model: a `SiT` in eval mode, or a callable with the same signature.
        x, noise: (b, C, H, W) clean latents or pixels, and the noise.
        t: (b,) times in [0, 1].
        labels: (b,) int64.
        teachers: one (tokens (b, N, Dz), their grid) per teacher, any dtype; () without teachers. For a model with a
            class token, one (tokens, grid, class token (b, Dz)); the class token is aligned like a further token, as in
            training.
        interpolant: `Interpolant`.
        class_token, class_noise: (b, class_dim) clean class tokens as the model denoises them, and their noise; for a
            model that has a class token.

    Returns:
        ImageLosses.
    """
    noised, velocity = interpolant.interpolate(x, noise, t)
    extra = {}
    if class_token is not None:
        extra["class_token"], class_velocity = interpolant.interpolate(class_token, class_noise, t)
    out = model(noised, t, labels, **extra)
    cosines = []
    for aligned, teacher in zip(out.aligned or (), teachers, strict=False):
        z = teacher_rows(teacher, model.grid)
        if len(teacher) > 2 and out.aligned_index is not None:
            z = gather_tokens(z, out.aligned_index)
        cosines.append(torch.cosine_similarity(aligned.double(), z.double(), dim=-1).mean(dim=1))
    losses = ImageLosses(_squared_error(out.velocity, velocity), cosines)
    if class_token is None:
        return losses
    return losses._replace(class_velocity_loss=_squared_error(out.class_velocity, class_velocity))


def teacher_rows(teacher, grid):
    """A teacher's rows on a student's grid.

    Args:
        teacher: (tokens, their grid) or (tokens, their grid, class token (b, Dz)).

    Returns:
        (b, N, Dz) float32; (b, 1 + N, Dz), the class token first, if it is given.
    """
    tokens, own_grid, *row = teacher
    z = resample_tokens(tokens.float(), own_grid, grid)
    return torch.cat([row[0].float().unsqueeze(1), z], dim=1) if row else z


def _squared_error(found, target):
    return (found - target).double().square().flatten(1).mean(dim=1)
