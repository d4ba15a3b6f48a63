"""Measure how well alignment gradients agree between two random subsets of the same images.

Two subsets have gradients at different tokens, which cannot be compared directly. Both have gradients with respect to
the trunk's parameters up to the tap, which the optimizer adds up. The measure is therefore the cosine of the two flat
parameter gradients, for the whole trunk and for every block. For comparison it is also measured for full-token
alignment between two draws of noise on the same images, and between different images.
"""

from maskalign.analysis.gradients import cut_at_tap, gradient_cosines, trunk_gradients

AGREEMENT_DRAWS = 1_000_000  # number of the first draw for the agreement; other measurements use smaller numbers
PAIRS = {
    "two subsets, blocks see them alone": "two random subsets of the same images and noise, masked forward as trained",
    "two subsets, blocks see all": "two random subsets of the same images and noise, full forward",
    "subset and all tokens": "a subset (masked forward where trained so, else full) and all tokens",
    "all tokens, other noise": "all tokens of the same images at the same times under other noise",
    "all tokens, other images": "all tokens of other images",
}
MASKED_PAIR, FULL_PAIR, MIXED_PAIR, NOISE_PAIR, IMAGE_PAIR = PAIRS


def agreement_work(images, settings):
    """Number of groups of images in `measure_agreement`, for a progress bar."""
    return len(images.batches(min(settings.batch_size, images.count), whole=True))


def measure_agreement(subject, images, settings, progress=None):
    """Cosines of alignment gradients of the trunk, for groups of `batch_size` images at drawn times.

    Args:
        subject, images, settings: as for `measure_tokens`.
        progress: called after each group with the number 1.

    Returns:
        dict pair (a key of `PAIRS`) -> dict place (`all`, `embedding`, `mixer`, `block 1`, ...) -> list of cosines, one
        per group of images.
    """
    trunk = cut_at_tap(subject.model)
    found = {pair: {} for pair in PAIRS}

    def note(pair, first, second):
        for place, value in gradient_cosines(first, second).items():
            found[pair].setdefault(place, []).append(value)

    before = None
    for rows in images.batches(min(settings.batch_size, images.count), whole=True):
        draws = [
            images.draws(subject, settings.keep_ratio, AGREEMENT_DRAWS + number, rows, settings.seed)
            for number in (0, 1)
        ]
        batch = images.noised(subject, draws[0], rows)
        renoised = images.noised(subject, draws[1]._replace(time=draws[0].time, posterior=draws[0].posterior), rows)
        subsets = [(batch.subset, batch.align_subset), (renoised.subset, renoised.align_subset)]
        common, token = (trunk, batch.x_t, batch.t, batch.labels, batch.teachers), {"class_token": batch.class_token}
        whole = trunk_gradients(*common, **token)
        pair = [trunk_gradients(*common, *subset, full_forward=True, **token) for subset in subsets]
        note(FULL_PAIR, *pair)
        if subject.trained_on_subsets:
            pair = [trunk_gradients(*common, *subset, **token) for subset in subsets]
            note(MASKED_PAIR, *pair)
        note(MIXED_PAIR, pair[0], whole)
        other = {"class_token": renoised.class_token}
        note(NOISE_PAIR, whole, trunk_gradients(trunk, renoised.x_t, *common[2:], **other))
        if before is not None:
            note(IMAGE_PAIR, whole, before)
        before = whole
        if progress is not None:
            progress(1)
    return {pair: places for pair, places in found.items() if places}
