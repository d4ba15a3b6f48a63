"""Every random number of a training step, keyed by (seed, step, slot group of the global batch).

A slot is a place in the global batch. Slots are drawn in groups of a fixed size, each group from a generator seeded by
(seed, step, group), so that what a sample is given does not depend on the number of ranks, on accumulation or on a
restart, and a rank draws only for its own slots.
"""

import hashlib
from typing import NamedTuple, Optional

import torch

from maskalign.models.routing import draw_subset
from maskalign.objective.interpolant import lognormal_time

SLOT_GROUP = 8


class Draws(NamedTuple):
    """The random numbers for the b images of one micro-batch.

    time: (b,) float32 in [0, 1].
    noise: (b, C, H, W) float32.
    drop_label: (b,) bool, which labels become "no class".
    subset: (b, K) int64, ascending; None: all tokens.
    align_subset: (b, n) int64, positions among the tokens present at the tap; None: all of those.
    posterior: (b, C, H, W) float32, the draw from the VAE's posterior; None for pixels.
    """

    time: torch.Tensor
    noise: torch.Tensor
    drop_label: torch.Tensor
    subset: Optional[torch.Tensor]
    align_subset: Optional[torch.Tensor]
    posterior: Optional[torch.Tensor]


def group_seed(seed, step, group):
    """A 63-bit seed for one slot group of one step; neighbouring keys give unrelated seeds.

    torch's CPU generator keeps 32 bits of it, so over a long run two groups may meet the same stream by chance, as any
    two of 2^32 may; steps that are near each other do not do so more often.
    """
    digest = hashlib.blake2b(f"{seed}/{step}/{group}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def draw(
    seed,
    step,
    first_slot,
    count,
    *,
    shape,
    grid,
    keep,
    align=None,
    time="uniform",
    path="linear",
    label_dropout=0.1,
    subset="uniform",
    posterior=False,
    device="cpu",
):
    """Draw for the slots [first_slot, first_slot + count) of the global batch of a step.

    Args:
        seed, step: the run's seed and the step's number.
        shape: (C, H, W) of the input.
        grid: (rows, columns) of its tokens.
        keep: number K of tokens in the subset; None or N for all tokens.
        align: number of tokens to align, drawn independently among those present at the tap; None for all of them.
        time: `uniform` or `lognormal`; path: the interpolant's path, which the log-normal time depends on.
        label_dropout: share of labels to drop.
        subset: sampler of the subset (`routing.SUBSET_SAMPLERS`).
        posterior: draw noise for the VAE's posterior as well.

    Returns:
        Draws on `device`. Draws on a CPU and on a GPU differ, as torch's generators do.
    """
    tokens = grid[0] * grid[1]
    subsetting = keep is not None and keep < tokens
    present = keep if subsetting else tokens
    parts = []
    generator = torch.Generator(device=device)
    last_slot = first_slot + max(count, 1) - 1  # no slots: one group is drawn, and nothing of it is taken
    for group in range(first_slot // SLOT_GROUP, last_slot // SLOT_GROUP + 1):
        generator.manual_seed(group_seed(seed, step, group))
        own = dict(generator=generator, device=device)
        t = torch.rand(SLOT_GROUP, **own)
        normal = torch.randn(SLOT_GROUP, **own)
        noise = torch.randn(SLOT_GROUP, *shape, **own)
        drop_label = torch.rand(SLOT_GROUP, **own) < label_dropout
        # What a setting may leave out is drawn last, so that recipes share time, noise and labels.
        eps = torch.randn(SLOT_GROUP, *shape, **own) if posterior else None
        chosen = draw_subset(SLOT_GROUP, grid, keep, subset, **own) if subsetting else None
        aligned = draw_subset(SLOT_GROUP, (1, present), align, **own) if align is not None else None
        low = max(first_slot - group * SLOT_GROUP, 0)
        high = min(first_slot + count - group * SLOT_GROUP, SLOT_GROUP)
        t = lognormal_time(normal, path) if time == "lognormal" else t
        parts.append([None if x is None else x[low:high] for x in (t, noise, drop_label, chosen, aligned, eps)])
    return Draws(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))
