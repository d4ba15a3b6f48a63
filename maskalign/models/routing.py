"""Subsets of tokens: drawing them, gathering them, and restoring dropped tokens.

MaskAlign (arXiv 2606.08788) draws subsets uniformly and never restores the dropped tokens; `bypass` restores them as
TREAD does (arXiv 2501.04765), `fuse` as SPRINT does (arXiv 2510.21986).
"""

from functools import partial
from typing import Callable, Optional, Tuple, Union

import torch
from torch import nn

SUBSET_SAMPLERS = ("uniform", "grid", "block")


def draw_subset(
    batch: int,
    grid: Tuple[int, int],
    count: int,
    sampler: str = "uniform",
    *,
    generator: Optional[torch.Generator] = None,
    device: Union[str, torch.device, None] = None,
    uniform: Optional[Callable[..., torch.Tensor]] = None,
) -> torch.Tensor:
    """Draw `count` distinct token indices per image.

    Every sampler draws a random priority for each token and keeps the tokens with the lowest ones, so that one launch
    draws the whole batch.

    Args:
        batch: number of images B.
        grid: (rows, columns) of the token grid, N = rows * columns.
        count: number of tokens to keep, K, in [0, N].
        sampler: `uniform` (every subset is equally likely), `grid` (the same number of random tokens from every 2x2
            cell;
            if K is not a multiple of the number of cells, one more from random cells) or `block` (the tokens nearest to
            a random center, which form a square).
        generator: torch.Generator of `device`.
        uniform: function that returns new uniform random numbers in [0, 1) of a shape, called as `uniform(B, ...)`. The
            default is torch.rand with the generator.

    Returns:
        (B, K) int64, ascending in every row.

    Raises:
        ValueError: the count is out of range, or the sampler is unknown.
    """
    uniform = uniform or partial(torch.rand, generator=generator, device=device)
    rows, columns = grid
    tokens = rows * columns
    if not 0 <= count <= tokens:
        raise ValueError(f"count must be in [0, {tokens}], got {count}")
    priority = uniform(batch, tokens)
    device = priority.device
    if sampler == "grid":
        priority = _rank_in_cell(priority, rows, columns) + _cell_jitter(batch, rows, columns, uniform, device)
    elif sampler == "block":
        center = uniform(batch, 2, 1)
        row = torch.arange(tokens, device=device) // columns
        column = torch.arange(tokens, device=device) % columns
        distance = torch.maximum((row - center[:, 0] * (rows - 1)).abs(), (column - center[:, 1] * (columns - 1)).abs())
        # Noise below 1 breaks ties between tokens of one ring; distances of different rings differ by at least 1.
        priority = distance + 0.5 * priority
    elif sampler != "uniform":
        raise ValueError(f"sampler must be one of {SUBSET_SAMPLERS}, got {sampler!r}")
    return priority.argsort(dim=1)[:, :count].sort(dim=1).values


def _cells(rows, columns, device):
    """The index of the 2x2 cell of every token, (N,), and the number of cells. Edge cells of odd grids are smaller."""
    row = torch.arange(rows, device=device)[:, None] // 2
    column = torch.arange(columns, device=device)[None, :] // 2
    across = (columns + 1) // 2
    return (row * across + column).flatten(), across * ((rows + 1) // 2)


def _rank_in_cell(priority, rows, columns):
    """The rank (0..3) of every token by priority among the tokens of its 2x2 cell."""
    cell, _ = _cells(rows, columns, priority.device)
    order = (priority + cell).argsort(dim=1)  # priorities are below 1, so tokens are sorted by cell first
    sorted_cell = cell[order]
    position = torch.arange(order.shape[1], device=order.device).expand_as(order)
    first_of_cell = torch.searchsorted(sorted_cell, sorted_cell)
    return torch.empty_like(priority).scatter_(1, order, (position - first_of_cell).to(priority.dtype))


def _cell_jitter(batch, rows, columns, uniform, device):
    """A random number in [0, 1) per image and cell, the same for all tokens of the cell: (B, N)."""
    cell, cells = _cells(rows, columns, device)
    return uniform(batch, cells)[:, cell]


def gather_tokens(x, subset):
    """Rows `subset` (B, K) of x (B, N, D), as (B, K, D).

    This is one index_select over flattened rows: `gather` with an expanded index is several times slower on a CPU.
    """
    batch, tokens, width = x.shape
    first = torch.arange(batch, device=subset.device).unsqueeze(1) * tokens
    return x.reshape(-1, width).index_select(0, (subset + first).flatten()).view(batch, -1, width)


def scatter_tokens(x, subset, values):
    """x (B, N, D) with its rows `subset` (B, K) replaced by `values` (B, K, D)."""
    return x.scatter(1, subset.unsqueeze(-1).expand(-1, -1, x.shape[-1]), values.to(x.dtype))


class Fuse(nn.Module):
    """SPRINT's restore: `h = Linear([f_shallow ; pad(g_deep)])` (arXiv 2510.21986, section 3).

    The kept tokens are padded to the full grid with a learned mask token, concatenated with the tokens before the drop,
    and projected to the model's width.
    """

    def __init__(self, width):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(width))
        self.linear = nn.Linear(2 * width, width)

    def forward(self, before, deep, subset=None):
        """Restore all tokens.

        Args:
            before: (B, N, D), all tokens before the drop.
            deep: (B, K, D), the kept tokens; (B, N, D) if subset is None.
            subset: (B, K) int64, the indices of the kept tokens.

        Returns:
            (B, N, D).
        """
        if subset is not None:
            padding = self.mask_token.to(deep.dtype).expand(before.shape)
            deep = scatter_tokens(padding, subset, deep)
        return self.linear(torch.cat([before, deep], dim=-1))
