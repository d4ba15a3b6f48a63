"""The training loss: L = L_velocity + class_weight * L_class_velocity + align_weight * L_align.

This is the loss of MaskAlign (arXiv 2606.08788). The losses of REG (all patches are kept), REPA (no class token) and
SiT (no alignment) are special cases.
"""

from typing import NamedTuple

import torch

from maskalign.models.layers import patchify
from maskalign.models.routing import gather_tokens
from maskalign.objective.alignment import alignment_loss
from maskalign.objective.interpolant import Interpolant


class Losses(NamedTuple):
    """0-d float32 tensors: `total` is differentiated, and the others are its parts without their weights.

    `class_velocity` is zero for a model without a class token.
    """

    total: torch.Tensor
    velocity: torch.Tensor
    alignment: torch.Tensor
    class_velocity: torch.Tensor


def sample_posterior(moments, draw, scale=1.0, bias=0.0):
    """A latent from stored moments: (mean + std * draw) * scale + bias.

    Args:
        moments: (B, 2C, h, w), mean then standard deviation, any floating dtype.
        draw: (B, C, h, w) standard normal.

    Returns:
        (B, C, h, w) in draw's dtype.
    """
    mean, std = moments.to(draw.dtype).chunk(2, dim=1)
    return (mean + std * draw) * scale + bias


def training_loss(
    model,
    x,
    labels,
    teachers,
    draws,
    *,
    align_weight=0.5,
    align=None,
    path="linear",
    dtype=None,
    class_token=None,
    class_weight=0.03,
):
    """The loss of one micro-batch and its parts.

    Args:
        model: a `SiT`, or an object that is called in the same way.
        x: (B, C, H, W) clean latents or pixels, float32 (or float64).
        labels: (B,) int64.
        teachers: one (B, N, Dz) per teacher, floating or int8, on the student's token grid; () for none. For a model
            with a class token (B, 1 + N, Dz), with the teacher's class token as row 0.
        draws: `Draws` for these B images.
        align_weight: weight of the alignment loss, a number; or a 0-d tensor, if `align` is given.
        align: whether there is an alignment loss; without one the projectors are not run. The default is True if there
            are teachers and the weight is above 0. Only this comparison reads the value of the weight, which would
            synchronize for a tensor.
        path: the interpolant's path.
        dtype: the dtype of the model's input; the default is that of x. The loss is computed in x's dtype.
        class_token: (B, class_dim) clean class tokens, for a model that has one. They are noised with the image's time.
        class_weight: weight of the class token's velocity loss (REG's beta, arXiv 2507.01467).

    Returns:
        Losses. The velocity loss is the mean squared error over all elements of the predicted patches, and the class
        velocity loss that over the elements of the class token. The alignment loss is a mean over the class token and
        the aligned patches.
    """
    noise, t = draws.noise.to(x.dtype), draws.time.to(x.dtype)
    interpolant = Interpolant(path)
    x_t, target = interpolant.interpolate(x, noise, t)
    labels = torch.where(draws.drop_label, model.num_classes, labels)
    dtype = dtype or x.dtype
    extra = {}
    if class_token is not None:
        clean, class_noise = class_token.to(x.dtype), draws.class_noise.to(x.dtype)
        class_t, class_target = interpolant.interpolate(clean, class_noise, t)
        extra["class_token"] = class_t.to(dtype)
    if align is None:
        align = len(teachers) > 0 and align_weight > 0
    # The time is not converted: bf16 would round it to 256 steps.
    out = model(x_t.to(dtype), t, labels, draws.subset, draws.align_subset, align, **extra)
    if out.velocity.dim() == 3:
        target = gather_tokens(patchify(target, model.patch_size), draws.subset)
    velocity = (out.velocity.to(x.dtype) - target).square().mean()
    zero = velocity.new_zeros(())
    alignment = alignment_loss(out.aligned, teachers, out.aligned_index) if align else zero
    total = velocity + align_weight * alignment
    if class_token is None:
        return Losses(total, velocity, alignment, zero)
    class_velocity = (out.class_velocity.to(x.dtype) - class_target).square().mean()
    return Losses(total + class_weight * class_velocity, velocity, alignment, class_velocity)
