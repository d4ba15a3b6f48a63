"""The rational GELU of compiled CPU code against ATen's in float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from maskalign.models.gelu import RationalGelu, gelu, rational_tanh

GRID = torch.linspace(-12, 12, 100_001, dtype=torch.float64)


def exact(x):
    """GELU and its slope in float64."""
    x = x.double().requires_grad_()
    y = F.gelu(x, approximate="tanh")
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


def test_tanh_is_exact_to_float32():
    assert (rational_tanh(GRID.float()).double() - GRID.float().double().tanh()).abs().max() < 5e-7


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.01)])
def test_values_and_slopes(dtype, tolerance):
    x = GRID.to(dtype).requires_grad_()
    y = RationalGelu.apply(x)
    (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
    want, want_slope = exact(x.detach())
    assert y.dtype == slope.dtype == dtype
    assert ((y.double() - want).abs() / (1 + want.abs())).max() < tolerance
    assert ((slope.double() - want_slope).abs()).max() < tolerance
    assert (slope.double() - want_slope).norm() / want_slope.norm() < tolerance / 5


def test_far_out_it_is_the_identity_or_zero():
    x = torch.tensor([-1e20, -1e4, -60.0, 60.0, 1e4], requires_grad=True)
    y = RationalGelu.apply(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(y, torch.tensor([0.0, 0.0, 0.0, 60.0, 1e4]))
    assert torch.equal(slope[1:], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_compiled_cpu_code_takes_the_rational_form_and_nothing_else_does():
    x = GRID.float()[::100].contiguous()
    compiled = torch.compile(gelu, backend="aot_eager", fullgraph=True)
    assert torch.equal(gelu(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(compiled(x), RationalGelu.apply(x)) and not torch.equal(compiled(x), gelu(x))
    assert torch.equal(compiled(x.double()), F.gelu(x.double(), approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_cpu_code_keeps_the_slope(dtype):
    """torch 2.11 compiles a Function that ends in a cast to its own dtype into one without a gradient, silently."""
    x = GRID.to(dtype)[::100].contiguous().requires_grad_()
    grad = torch.linspace(0.5, 1.5, x.numel()).to(dtype)
    out = torch.compile(lambda x: gelu(2 * x), backend="aot_eager", fullgraph=True)(x)
    (got,) = torch.autograd.grad(out, x, grad)
    (want,) = torch.autograd.grad(RationalGelu.apply(2 * x), x, grad)
    assert want.any() and torch.equal(got, want)
