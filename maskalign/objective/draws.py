"""All random numbers of a training step, keyed by (seed, step, slot of the global batch).

A slot is a position in the global batch. The numbers of a slot do not depend on the number of ranks, on accumulation or
on restarts, and a rank draws only for its own slots. On a CPU, slots are drawn in groups of a fixed size, each from a
generator seeded by (seed, step, group). On a GPU, all slots are drawn together with a counter-based generator.
"""

import hashlib
import itertools
import math
from functools import partial
from typing import NamedTuple, Optional

import torch

from maskalign.models.routing import draw_subset
from maskalign.objective.interpolant import lognormal_time
from maskalign_kernels import keyed_random

SLOT_GROUP = 8


class Draws(NamedTuple):
    """The random numbers for the b images of one micro-batch.

    time: (b,) float32 in [0, 1].
    noise: (b, C, H, W) float32.
    drop_label: (b,) bool, whether a label is replaced by "no class".
    subset: (b, K) int64, ascending; None: all tokens.
    align_subset: (b, n) int64, indices among the patch tokens present at the tap; None: all of these.
    posterior: (b, C, H, W) float32, noise for the draw from the VAE's posterior; None for pixels.
    class_noise: (b, class_dim) float32, noise of the class token; None for a model without one.
    """

    time: torch.Tensor
    noise: torch.Tensor
    drop_label: torch.Tensor
    subset: Optional[torch.Tensor]
    align_subset: Optional[torch.Tensor]
    posterior: Optional[torch.Tensor]
    class_noise: Optional[torch.Tensor] = None


def group_seed(seed, step, group):
    """A 63-bit seed for one slot group of one step. Neighboring keys give unrelated seeds.

    torch's CPU generator uses only 32 bits of the seed, so in a long run two groups may have the same stream by chance.
    This is not more likely for steps that are near each other.
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
    class_dim=None,
    device="cpu",
):
    """Draw for the slots [first_slot, first_slot + count) of the global batch of a step.

    Args:
        seed, step: the run's seed and the step's number.
        shape: (C, H, W) of the input.
        grid: (rows, columns) of its tokens.
        keep: number K of tokens in the subset; None or N for all tokens.
        align: number of tokens to align, drawn independently among those present at the tap; None for all of them.
        time: `uniform` or `lognormal`.
        path: the interpolant's path, on which the log-normal time depends.
        label_dropout: share of labels to drop.
        subset: sampler of the subset (`routing.SUBSET_SAMPLERS`).
        posterior: draw noise for the VAE's posterior too.
        class_dim: width of the class token for which noise is drawn; None for none.
        device: where the numbers are drawn.

    Returns:
        Draws on `device`. Draws on a CPU and on a GPU differ, as with torch's generators.
    """
    tokens = grid[0] * grid[1]
    subsetting = keep is not None and keep < tokens
    present = keep if subsetting else tokens

    def rows(numbers, count):
        """The fields of `Draws` for `count` images, from a `GeneratedNumbers` or `KeyedNumbers`."""
        t = numbers.uniform(count)
        normal = numbers.normal(count)
        noise = numbers.normal(count, *shape)
        drop_label = numbers.uniform(count) < label_dropout
        # Optional numbers are drawn last, so that recipes share time, noise and labels.
        eps = numbers.normal(count, *shape) if posterior else None
        chosen = aligned = None
        if subsetting:
            chosen = draw_subset(count, grid, keep, subset, uniform=numbers.uniform)
        if align is not None:
            aligned = draw_subset(count, (1, present), align, uniform=numbers.uniform)
        class_noise = numbers.normal(count, class_dim) if class_dim else None
        t = lognormal_time(normal, path) if time == "lognormal" else t
        return t, noise, drop_label, chosen, aligned, eps, class_noise

    if has_keyed_numbers(device):
        return Draws(*rows(KeyedNumbers(seed, step, first_slot, device), count))
    parts = []
    last_slot = first_slot + max(count, 1) - 1  # for count == 0, draw one group and return no rows
    for group in range(first_slot // SLOT_GROUP, last_slot // SLOT_GROUP + 1):
        low = max(first_slot - group * SLOT_GROUP, 0)
        high = min(first_slot + count - group * SLOT_GROUP, SLOT_GROUP)
        drawn = rows(GeneratedNumbers(seed, step, group, device), SLOT_GROUP)
        parts.append([None if x is None else x[low:high] for x in drawn])
    return Draws(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


def has_keyed_numbers(device):
    """Whether draws on a device are keyed per slot instead of per group."""
    return torch.device(device).type == "cuda"


class GeneratedNumbers:
    """Random numbers for one slot group from torch's generator, in the order of the calls."""

    def __init__(self, seed, step, group, device):
        generator = torch.Generator(device=device)
        generator.manual_seed(group_seed(seed, step, group))
        self.uniform = partial(torch.rand, generator=generator, device=device)
        self.normal = partial(torch.randn, generator=generator, device=device)


class KeyedNumbers:
    """Random numbers for any number of slots from `first_slot` on. Each call is one launch and stream of
    `keyed_random`.

    A generator per group would need hundreds of launches per step on a GPU, which can take longer than the step.
    """

    def __init__(self, seed, step, first_slot, device):
        self.key, self.first_slot, self.device = group_seed(seed, step, 0), first_slot, device
        self.streams = itertools.count()

    def uniform(self, rows, *size):
        return self._draw(rows, size, normal=False)

    def normal(self, rows, *size):
        return self._draw(rows, size, normal=True)

    def _draw(self, rows, size, normal):
        stream = next(self.streams)
        table = keyed_random(
            self.key, stream, self.first_slot, rows, math.prod(size), normal=normal, device=self.device
        )
        return table.view(rows, *size)
