"""The stability gap: how much worse the alignment is if the model sees only a random subset of the patches.

    G_r = L_align(class token and a random share 1 - r of the patches) - L_align(all tokens)

for the same images, times and noise (MaskAlign, arXiv 2606.08788). The tokens are dropped after the mixing layers, as
in the paper's training: all blocks see only the subset, and the loss is a mean over the kept tokens. Both losses are
the training loss -mean cos, including the class token if the model has one.

The gap of one image depends strongly on chance, because some patches are harder than others, and a subset has more or
fewer of them. `gaps_by_image` therefore also returns the *matched* gap, which compares the subset's loss with the loss
of the same tokens when the model sees all tokens. It has the same mean over all subsets and a smaller spread.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from maskalign.evaluation.heldout import SEED
from maskalign.evaluation.losses import teacher_rows
from maskalign.models.mixer import NoMixer
from maskalign.models.routing import gather_tokens
from maskalign.objective.draws import group_seed
from maskalign.objective.interpolant import Interpolant
from maskalign.sampling.drawing import evaluating
from maskalign.sampling.noise import ImageNoise

MASK_RATIO = 0.25  # the paper's r


def kept_patches(mask_ratio, patches):
    """Number of patches that are kept: (1 - r) N, rounded to the nearest whole number, at least 1."""
    return max(1, int((1 - mask_ratio) * patches + 0.5))


def can_mask(model):
    """True if a gap can be measured: the model has projectors, and none of them needs the whole token grid."""
    return len(model.projectors) > 0 and not any(projector.needs_grid for projector in model.projectors)


@contextmanager
def ending_at_tap(model):
    """Context in which a `SiT` ends at its tap, and in which the blocks up to there see only a subset if one is given.

    For a pass on all tokens, only the blocks after the tap are skipped. A subset is applied after the mixing layers,
    independently of the model's route. Models that were trained on all tokens, or aligned on a subset that their blocks
    do not see, are therefore measured in the same way as models that were trained on subsets.
    """
    before = model.blocks, model.route, model.restore, model.mixer
    start = model.route[0] if model.route else 0
    mixes = start < model.align_depth  # mixing layers after the tap do not affect the alignment
    try:
        model.blocks = model.blocks[: model.align_depth]
        model.route, model.restore = (start if mixes else 0, model.align_depth), "none"
        if not mixes:
            model.mixer = NoMixer()
        yield model
    finally:
        model.blocks, model.route, model.restore, model.mixer = before


def keyed_subsets(key, indices, patches, count):
    """Uniform random subsets of the patches that depend only on a key and the image's number.

    Args:
        key: any text.
        indices: numbers of the B images.
        patches, count: N and K.

    Returns:
        (B, K) int64, ascending in every row, on the CPU.
    """
    rows = []
    for index in indices:
        generator = torch.Generator().manual_seed(group_seed(key, 0, int(index)))
        rows.append(torch.randperm(patches, generator=generator)[:count].sort().values)
    return torch.stack(rows)


class ImageGaps(NamedTuple):
    """Two (B,) float64 tensors: `plain` is the definition; `matched` has the same mean over subsets and less spread."""

    plain: torch.Tensor
    matched: torch.Tensor


def gaps_by_image(full, masked, subset, with_class):
    """The stability gap of every image.

    The matched gap is the difference of the loss of the subset's tokens between the two passes, plus the expected value
    of the rest of the plain gap. This expected value is computed exactly. It is 0 for a model without a class token.
    With a class token it is not, because the class token's share of the loss grows from 1 / (1 + N) to 1 / (1 + K).

    Args:
        full, masked: from `alignment_by_token`, (B, N) on all tokens and (B, K) on a subset; with a class token one
            column more.
        subset: (B, K) int64, ascending: the patches of `masked`.
        with_class: True if the first token of both is the class token.

    Returns:
        ImageGaps.
    """
    rows = torch.cat([torch.zeros_like(subset[:, :1]), 1 + subset], dim=1) if with_class else subset
    plain = masked.mean(dim=1) - full.mean(dim=1)
    matched = masked.mean(dim=1) - full.gather(1, rows).mean(dim=1)
    if with_class:
        kept, patches = subset.shape[1], full[:, 1:].mean(dim=1)
        matched = matched + (full[:, 0] + kept * patches) / (1 + kept) - full.mean(dim=1)
    return ImageGaps(plain, matched)


@torch.no_grad()
def alignment_by_token(model, x_t, t, labels, teachers, *, class_token=None, subset=None):
    """The alignment loss of every token, -cos averaged over teachers. Its mean over tokens is an image's loss.

    Args:
        model: a `SiT` in eval mode.
        x_t: (B, C, H, W) noised input; t (B,) time; labels (B,) int64.
        teachers: one (B, N, Dz) per teacher, floating or int8, on the student's grid; (B, 1 + N, Dz) with the class
            token as row 0 for a model that has one.
        class_token: (B, class_dim) the noised class token, for a model that has one.
        subset: (B, K) int64, ascending: the patches that the model sees, see `ending_at_tap`; None for all.

    Returns:
        (B, N) float64, (B, K) for a subset; one column more, the class token first, for a model that has one.
    """
    extra = {} if class_token is None else {"class_token": class_token}
    out = model(x_t, t, labels, subset, **extra)
    losses = []
    for rows, teacher in zip(out.aligned, teachers, strict=True):
        wanted = teacher if out.aligned_index is None else gather_tokens(teacher, out.aligned_index)
        losses.append(-torch.cosine_similarity(rows.double(), wanted.double(), dim=-1))
    return torch.stack(losses).mean(dim=0)


def alignment_by_image(model, x_t, t, labels, teachers, *, class_token=None, subset=None):
    """The alignment loss of every image, (B,) float64: the mean over tokens of `alignment_by_token`.

    For the arguments see `alignment_by_token`.
    """
    return alignment_by_token(model, x_t, t, labels, teachers, class_token=class_token, subset=subset).mean(dim=1)


@torch.no_grad()
def held_out_gap(model, held_out, *, mask_ratio=MASK_RATIO, path="linear", bins=2):
    """A cheap measurement of the stability gap on held-out images, with one subset per image at each of a few times.

    Noise and times are those of `losses_by_time` with the same number of bins. The two passes of an image differ only
    in the subset, and both end at the tap.

    Args:
        model: a `SiT`, with the weights to measure.
        held_out: `HeldOut`.
        mask_ratio: share of the patches that is dropped.
        path: the interpolant's path.
        bins: equal bins of the time in [0, 1], each with one time of every image.

    Returns:
        dict: `stability_gap`, the matched `stability_gap_matched`, and their standard errors over images,
        `stability_gap_error` and `stability_gap_matched_error`. {} for a model without alignment or with projectors
        that need the whole grid, if no patch would be dropped, or for a single image.
    """
    if not can_mask(model) or not held_out.teachers or held_out.count < 2:
        return {}
    kept = kept_patches(mask_ratio, model.num_tokens)
    if kept >= model.num_tokens:
        return {}
    device, interpolant, gaps = next(model.parameters()).device, Interpolant(path), []
    # Compiled blocks would be recompiled for the length of a subset. This would take longer than these few passes.
    with evaluating(model), ending_at_tap(model), torch.compiler.set_stance("force_eager"):
        for first, x, labels, teachers in held_out.batches(device):
            numbers = range(first, first + len(x))
            noise = ImageNoise(SEED, numbers, x.shape[1:], device).draw()
            normal = ImageNoise(SEED + 1, numbers, (1,)).draw(torch.float64).flatten()
            place = torch.special.ndtr(normal).to(device)  # uniform in (0, 1)
            class_token = held_out.class_token(teachers)
            if class_token is not None:
                class_noise = ImageNoise(SEED + 3, numbers, class_token.shape[1:], device).draw()
            rows, found = [teacher_rows(teacher, model.grid) for teacher in teachers], []
            for index in range(bins):
                t, own = ((index + place) / bins).float(), {}
                if class_token is not None:
                    own["class_token"], _ = interpolant.interpolate(class_token, class_noise, t)
                inputs = (model, interpolant.interpolate(x, noise, t)[0], t, labels, rows)
                subset = keyed_subsets(f"held out/{SEED}/{index}", numbers, model.num_tokens, kept).to(device)
                masked, full = (alignment_by_token(*inputs, **own, subset=chosen) for chosen in (subset, None))
                found.append(torch.stack(gaps_by_image(full, masked, subset, class_token is not None)))
            gaps.append(torch.stack(found).mean(dim=0))
    measured = {}
    for name, values in zip(("stability_gap", "stability_gap_matched"), torch.cat(gaps, dim=1), strict=True):
        measured[name] = float(values.mean())
        measured[f"{name}_error"] = float(values.std() / len(values) ** 0.5)
    return measured
