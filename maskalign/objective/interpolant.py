"""Interpolants between data (t = 0) and noise (t = 1), as in SiT (arXiv 2401.08740, section 3)."""

import math
from dataclasses import dataclass

import torch

from maskalign.config.settings import PATHS


@dataclass(frozen=True)
class Interpolant:
    """x_t = alpha(t) x + sigma(t) eps, with velocity alpha'(t) x + sigma'(t) eps.

    Args:
        path: `linear` (alpha = 1 - t, sigma = t) or `cosine` (alpha = cos(pi t / 2), sigma = sin(pi t / 2)).
    """

    path: str = "linear"

    def __post_init__(self):
        if self.path not in PATHS:
            raise ValueError(f"path must be one of {PATHS}, got {self.path!r}")

    def coefficients(self, t):
        """(alpha, sigma, alpha', sigma') at t, a tensor of any shape; each has t's shape."""
        if self.path == "linear":
            return 1 - t, t, -torch.ones_like(t), torch.ones_like(t)
        angle = t * (math.pi / 2)
        alpha, sigma = torch.cos(angle), torch.sin(angle)
        return alpha, sigma, -math.pi / 2 * sigma, math.pi / 2 * alpha

    def interpolate(self, x, noise, t):
        """The noised input and its target velocity.

        Args:
            x, noise: (B, ...) data and noise.
            t: (B,) time.

        Returns:
            (x_t, velocity), both of x's shape.
        """
        t = t.reshape(-1, *[1] * (x.dim() - 1))
        alpha, sigma, d_alpha, d_sigma = self.coefficients(t)
        return alpha * x + sigma * noise, d_alpha * x + d_sigma * noise


def lognormal_time(normal, path="linear"):
    """Times with EDM's log-normal distribution of noise levels (arXiv 2206.00364; an option of REPA).

    With sigma = exp(n), t = sigma / (1 + sigma) on the linear path and 2/pi atan(sigma) on the cosine path.

    Args:
        normal: standard normal draws n, of any shape.
        path: `linear` or `cosine`.

    Returns:
        Times in (0, 1) of the same shape.
    """
    sigma = normal.exp()
    return sigma / (1 + sigma) if path == "linear" else 2 / math.pi * torch.atan(sigma)
