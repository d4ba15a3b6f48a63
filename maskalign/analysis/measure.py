"""Measure the norms of the alignment loss's gradient at every patch, for images, times, draws and ways to align."""

from dataclasses import dataclass, field

import numpy as np
import torch

from maskalign.analysis.gradients import cut_at_tap, token_gradients

# The ways to align: which tokens the loss uses, and which tokens the blocks see. The names appear in the tables.
FULL, MASKED, SUBSET = "full", "subset-masked", "subset-full-forward"
MODES = {
    FULL: "all tokens aligned",
    MASKED: "subset aligned, blocks see it alone",
    SUBSET: "subset aligned, blocks see all tokens",
}


@dataclass
class TokenNorms:
    """Gradient norms of one checkpoint, NaN at tokens that a draw does not align.

    norms: dict mode -> (times, draws, images, N) float32.
    cosines: dict mode -> (times, N) float64, the mean cosine of student and teacher where they were aligned.
    """

    norms: dict = field(default_factory=dict)
    cosines: dict = field(default_factory=dict)

    def map(self, mode, time=slice(None), images=slice(None)):
        """Mean norm by position, (N,) float64, over draws and the chosen images and times (an index or a slice)."""
        chosen = self.norms[mode][time][..., images, :]
        return np.nanmean(chosen.reshape(-1, chosen.shape[-1]), axis=0, dtype=np.float64)


def modes_of(subject):
    """The ways to align that are measured for a checkpoint; `subset-masked` only if it was trained on subsets."""
    return [FULL, MASKED, SUBSET] if subject.trained_on_subsets else [FULL, SUBSET]


def work_of(images, settings):
    """Number of batches in `measure_tokens`, for a progress bar."""
    return len(settings.times) * settings.draws * len(images.batches(settings.batch_size))


def measure_tokens(subject, images, settings, progress=None):
    """Gradient norms of a checkpoint.

    A draw has the same noise and subset at all times, so that only the time differs.

    Args:
        subject: `Subject` on the device of `images`.
        images: `Images`.
        settings: `AnalysisSettings`.
        progress: called after each batch with the number 1.

    Returns:
        TokenNorms.
    """
    trunk = cut_at_tap(subject.model)
    modes = modes_of(subject)
    tokens, times = trunk.num_tokens, len(settings.times)
    shape = (times, settings.draws, images.count, tokens)
    norms = {mode: np.full(shape, np.nan, dtype=np.float32) for mode in modes}
    sums = {mode: np.zeros((2, times, tokens)) for mode in modes}
    for rows in images.batches(settings.batch_size):
        for number in range(settings.draws):
            draws = images.draws(subject, settings.keep_ratio, number, rows, settings.seed)
            for place, time in enumerate(settings.times):
                for mode, found in _gradients(trunk, images.noised(subject, draws, rows, time), modes):
                    norms[mode][place, number, rows] = found.norms.float().cpu().numpy()
                    cosines = found.cosines.double().cpu().numpy()
                    sums[mode][:, place] += np.nansum(cosines, axis=0), np.isfinite(cosines).sum(axis=0)
                if progress is not None:
                    progress(1)
    with np.errstate(invalid="ignore"):
        return TokenNorms(norms, {mode: total / number for mode, (total, number) in sums.items()})


def _gradients(trunk, batch, modes):
    """(mode, TokenGradients) of a `Noised` batch for each mode."""
    common, token = (trunk, batch.x_t, batch.t, batch.labels, batch.teachers), {"class_token": batch.class_token}
    full = token_gradients(*common, **token)
    yield FULL, full
    if MASKED in modes:
        yield MASKED, token_gradients(*common, batch.subset, batch.align_subset, **token)
    if any(projector.needs_grid for projector in trunk.projectors) or batch.align_subset is not None:
        yield SUBSET, token_gradients(*common, batch.subset, batch.align_subset, full_forward=True, **token)
        return
    # With a pointwise projector, a token's gradient does not depend on which other tokens are aligned, so that no
    # second pass is needed.
    kept = torch.zeros_like(full.norms, dtype=torch.bool).scatter(1, batch.subset, True)
    yield SUBSET, type(full)(*(values.where(kept, float("nan")) for values in full))
