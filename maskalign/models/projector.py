"""Projectors from the student's width to a teacher's."""

from torch import nn

PROJECTORS = ("mlp", "conv")


class MLPProjector(nn.Sequential):
    """REPA's projector, which is pointwise: Linear-SiLU-Linear-SiLU-Linear (arXiv 2410.06940, appendix)."""

    needs_grid = False

    def __init__(self, width, hidden, teacher_dim):
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_dim)
        )


class ConvProjector(nn.Module):
    """iREPA's projector: one 3x3 convolution over the token grid (arXiv 2512.10794); it needs all N tokens."""

    needs_grid = True

    def __init__(self, width, teacher_dim, grid):
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, teacher_dim, 3, padding=1)

    def forward(self, x):
        """x (B, N, D) -> (B, N, Dz)."""
        z = x.transpose(1, 2).unflatten(2, self.grid)
        return self.conv(z).flatten(2).transpose(1, 2)


def make_projector(kind, width, hidden, teacher_dim, grid):
    """Make the projector of one teacher.

    Args:
        kind: one of `PROJECTORS`.
        width: D of the student.
        hidden: hidden width of `mlp`.
        teacher_dim: Dz.
        grid: (rows, columns) of the token grid, for `conv`.
    """
    if kind == "mlp":
        return MLPProjector(width, hidden, teacher_dim)
    if kind == "conv":
        return ConvProjector(width, teacher_dim, grid)
    raise ValueError(f"projector must be one of {PROJECTORS}, got {kind!r}")
