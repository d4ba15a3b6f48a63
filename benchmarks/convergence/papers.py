"""The paper's two measurements (MaskAlign, arXiv 2606.08788) at the end of a run, on held-out images.

They are measured as in `maskalign analyze`, on arrays that all runs of the benchmark share, so that every recipe has
the same images, times, noise and subsets.
"""

import numpy as np
import torch

from maskalign.analysis.gradients import cut_at_tap, token_gradients
from maskalign.analysis.stability import share_ratio, top_tokens
from maskalign.evaluation.gap import (
    MASK_RATIO,
    alignment_by_token,
    can_mask,
    ending_at_tap,
    gaps_by_image,
    kept_patches,
    keyed_subsets,
)
from maskalign.objective.interpolant import Interpolant
from maskalign.teachers import resample_tokens

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)
SUBSETS, BATCH, SEED = 4, 64, 20_260_610


def paper_measures(model, heldout, images, path="linear"):
    """Stability gap and heat map of a checkpoint.

    Args:
        model: a `SiT` in eval mode.
        heldout: `quality.Heldout`.
        images: number of images to use, the first ones.
        path: the interpolant's path.

    Returns:
        dict: `gap`, G_r at mask ratio 0.25, and `gap_error`, its standard error over images; `gap_matched` and
        `gap_matched_error`, an estimate of the same with less spread; `full_align_loss`, the alignment loss on all
        tokens; `heat_ratio`, the ratio of the largest to the smallest share of images in which a position is among the
        top 10 % of alignment gradients; and `heat_ratio_chance`, the upper limit of this ratio by chance. Empty for a
        model without a projector.
    """
    if not can_mask(model):
        return {}
    trunk, tokens = cut_at_tap(model), model.num_tokens
    kept = kept_patches(MASK_RATIO, tokens)
    batches = list(_batches(model, heldout, images, path))
    full, gaps, norms = [], [], []
    for _, *batch, class_token in batches:
        norms.append(token_gradients(trunk, *batch, class_token=class_token).norms.float().numpy())
    with ending_at_tap(trunk):
        for rows, *batch, class_token in batches:
            whole, own = alignment_by_token(trunk, *batch, class_token=class_token), []
            for number in range(SUBSETS):
                subset = keyed_subsets(f"gap/{SEED}/{number}", rows, tokens, kept)
                masked = alignment_by_token(trunk, *batch, class_token=class_token, subset=subset)
                own.append(torch.stack(gaps_by_image(whole, masked, subset, class_token is not None)))
            full.append(whole.mean(dim=1).numpy())
            gaps.append(torch.stack(own).mean(dim=0).numpy())
    # The batches are ordered by time, so the results are (times, images); for the gaps the first axis is plain,
    # matched.
    full = np.concatenate(full).reshape(len(TIMES), -1)
    plain, matched = np.concatenate(gaps, axis=1).reshape(2, len(TIMES), -1).mean(axis=1)
    top = top_tokens(np.concatenate(norms).reshape(len(TIMES), -1, tokens))
    heat = share_ratio(top, np.ones_like(top))
    return {
        "gap": float(plain.mean()),
        "gap_error": float(plain.std(ddof=1) / len(plain) ** 0.5),
        "gap_matched": float(matched.mean()),
        "gap_matched_error": float(matched.std(ddof=1) / len(matched) ** 0.5),
        "full_align_loss": float(full.mean()),
        "heat_ratio": heat.ratio.value,
        "heat_ratio_chance": float(heat.ratio.high),
    }


def _batches(model, heldout, images, path):
    """Yield (numbers of the images, x_t, t, labels, teachers, noised class token or None), ordered by time."""
    arrays, interpolant = heldout.arrays, Interpolant(path)
    clean = arrays["images"][:images].float() / 127.5 - 1
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(SEED))
    rows = resample_tokens(arrays["tokens"][:images].float(), heldout.teacher.grid, model.grid)
    if model.class_dim:
        rows = torch.cat([arrays["class_tokens"][:images].float().unsqueeze(1), rows], dim=1)
        class_tokens = heldout.class_tokens(model.class_dim)[:images]
        class_noise = torch.randn(class_tokens.shape, generator=torch.Generator().manual_seed(SEED + 1))
    for time in TIMES:
        for begin in range(0, len(clean), BATCH):
            some = slice(begin, begin + BATCH)
            t, class_t = torch.full((len(clean[some]),), time), None
            x_t, _ = interpolant.interpolate(clean[some], noise[some], t)
            if model.class_dim:
                class_t, _ = interpolant.interpolate(class_tokens[some], class_noise[some], t)
            numbers = range(begin, begin + len(t))
            yield numbers, x_t, t, arrays["labels"][:images][some], [rows[some]], class_t
