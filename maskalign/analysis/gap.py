"""The stability gap of a checkpoint per image, for fixed images, times and noise and several random subsets."""

from typing import NamedTuple

import numpy as np

from maskalign.analysis.gradients import cut_at_tap
from maskalign.errors import UsageError
from maskalign.evaluation.gap import (
    alignment_by_token,
    can_mask,
    ending_at_tap,
    gaps_by_image,
    kept_patches,
    keyed_subsets,
)

NOISE = 0  # the number of the draw whose noise all subsets share


class GapLosses(NamedTuple):
    """Alignment losses of the images, float64 arrays.

    full: (times, images), on all tokens; subset: (times, subsets, images); matched: (times, subsets, images), the
    matched gap, see `evaluation.gap`.
    """

    full: np.ndarray
    subset: np.ndarray
    matched: np.ndarray

    def gaps(self, time=slice(None), matched=False):
        """G_r by subset and image, (subsets, images), as a mean over the chosen times (an index or a slice)."""
        gaps = (self.matched if matched else self.subset - self.full[:, None])[time]
        return gaps if gaps.ndim == 2 else gaps.mean(axis=0)


def gap_work(images, settings):
    """Number of batches in `measure_gap`, for a progress bar."""
    return len(settings.times) * (1 + settings.subsets) * len(images.batches(settings.batch_size))


def check_mask_ratio(model, mask_ratio):
    """Number of patches that a mask ratio keeps.

    Raises:
        UsageError: no patch would be dropped.
    """
    kept = kept_patches(mask_ratio, model.num_tokens)
    if kept >= model.num_tokens:
        raise UsageError(
            f"--mask-ratio: {mask_ratio:g} of {model.num_tokens} patches drops none of them; give a larger one"
        )
    return kept


def measure_gap(subject, images, settings, progress=None):
    """Alignment losses of a checkpoint on all tokens and on random subsets of them.

    Args:
        subject: `Subject` on the device of `images`.
        images: `Images`.
        settings: `AnalysisSettings`; its times, mask_ratio, subsets, batch_size and seed are used.
        progress: called after each batch and forward pass with the number 1.

    Returns:
        GapLosses; None for a model whose projectors need the whole token grid, which cannot be run on a subset.

    Raises:
        UsageError: the mask ratio is so small that no patch would be dropped.
    """
    if not can_mask(subject.model):
        return None
    kept = check_mask_ratio(subject.model, settings.mask_ratio)
    trunk, tokens = cut_at_tap(subject.model), subject.model.num_tokens
    shape = len(settings.times), settings.subsets, images.count
    found = GapLosses(np.zeros((shape[0], shape[2])), np.zeros(shape), np.zeros(shape))
    with ending_at_tap(trunk):
        for rows in images.batches(settings.batch_size):
            draws = images.draws(subject, settings.keep_ratio, NOISE, rows, settings.seed)
            subsets = [
                keyed_subsets(f"gap/{settings.seed}/{number}", range(rows.start, rows.stop), tokens, kept)
                for number in range(settings.subsets)
            ]
            for place, time in enumerate(settings.times):
                batch = images.noised(subject, draws, rows, time)
                common = (trunk, batch.x_t, batch.t, batch.labels, batch.teachers)
                token = {"class_token": batch.class_token}
                full = alignment_by_token(*common, **token)
                found.full[place, rows] = full.mean(dim=1).cpu().numpy()
                for number, subset in enumerate(subsets):
                    subset = subset.to(images.device)
                    masked = alignment_by_token(*common, **token, subset=subset)
                    gaps = gaps_by_image(full, masked, subset, batch.class_token is not None)
                    found.subset[place, number, rows] = masked.mean(dim=1).cpu().numpy()
                    found.matched[place, number, rows] = gaps.matched.cpu().numpy()
                if progress is not None:
                    progress(1 + settings.subsets)
    return found
