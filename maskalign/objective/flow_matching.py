"""The training loss: L = L_velocity + align_weight * L_align (DESIGN section 2; SiT and REPA are special cases)."""

from typing import NamedTuple

import torch

from maskalign.models.layers import patchify
from maskalign.models.routing import gather_tokens
from maskalign.objective.alignment import alignment_loss
from maskalign.objective.interpolant import Interpolant


class Losses(NamedTuple):
    """0-d float32 tensors: `total` is differentiated; `velocity` and `alignment` are its parts, unweighted."""

    total: torch.Tensor
    velocity: torch.Tensor
    alignment: torch.Tensor


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


def training_loss(model, x, labels, teachers, draws, *, align_weight=0.5, path="linear", dtype=None):
    """Velocity loss and alignment loss of one micro-batch.

    Args:
        model: a `SiT`, or anything that is called like one.
        x: (B, C, H, W) clean latents or pixels, float32 (or float64).
        labels: (B,) int64.
        teachers: one (B, N, Dz) per teacher, floating or int8, on the student's token grid; () for none.
        draws: `Draws` for these B images.
        align_weight: weight of the alignment loss, a number; at 0 the projectors are not run. Or a 0-d tensor, of which
            nobody asks whether it is 0.
        path: the interpolant's path.
        dtype: the dtype of the model's input; x's own by default. The loss itself is computed in x's dtype.

    Returns:
        Losses. The velocity loss is the mean squared error over all elements of the tokens that were predicted.
    """
    noise, t = draws.noise.to(x.dtype), draws.time.to(x.dtype)
    x_t, target = Interpolant(path).interpolate(x, noise, t)
    labels = torch.where(draws.drop_label, model.num_classes, labels)
    dtype = dtype or x.dtype
    # Time goes in at full precision: bf16 would round it to 256 steps.
    align = len(teachers) > 0 and (isinstance(align_weight, torch.Tensor) or align_weight > 0)
    out = model(x_t.to(dtype), t, labels, draws.subset, draws.align_subset, align)
    if out.velocity.dim() == 3:
        target = gather_tokens(patchify(target, model.patch_size), draws.subset)
    velocity = (out.velocity.to(x.dtype) - target).square().mean()
    alignment = alignment_loss(out.aligned, teachers, out.aligned_index) if align else velocity.new_zeros(())
    total = velocity + align_weight * alignment
    return Losses(total, velocity, alignment)
