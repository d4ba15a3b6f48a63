"""Interpolants and times against their definitions."""

import math

import pytest
import torch

from maskalign.objective import Interpolant, lognormal_time


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_velocity_is_the_derivative_of_the_path(path, seed):
    g = torch.Generator().manual_seed(seed)
    x, noise = torch.randn(4, 2, 3, 3, generator=g).double(), torch.randn(4, 2, 3, 3, generator=g).double()
    t = torch.rand(4, generator=g).double() * 0.98 + 0.01
    h = 1e-6
    low, _ = Interpolant(path).interpolate(x, noise, t - h)
    high, _ = Interpolant(path).interpolate(x, noise, t + h)
    _, velocity = Interpolant(path).interpolate(x, noise, t)
    torch.testing.assert_close((high - low) / (2 * h), velocity, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_ends_are_data_and_noise(path):
    x, noise = torch.randn(2, 3).double(), torch.randn(2, 3).double()
    torch.testing.assert_close(Interpolant(path).interpolate(x, noise, torch.zeros(2).double())[0], x)
    torch.testing.assert_close(Interpolant(path).interpolate(x, noise, torch.ones(2).double())[0], noise)


def test_lognormal_time_has_the_noise_level_it_stands_for(seed):
    n = torch.randn(100, generator=torch.Generator().manual_seed(seed)).double()
    t = lognormal_time(n, "linear")
    torch.testing.assert_close(t / (1 - t), n.exp())
    t = lognormal_time(n, "cosine")
    torch.testing.assert_close(torch.tan(t * math.pi / 2), n.exp())


def test_unknown_path():
    with pytest.raises(ValueError, match="path"):
        Interpolant("spline")
