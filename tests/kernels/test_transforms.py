"""torch.func and second derivatives: what works is right, all else is refused in one line. On the CPU's path, and in
Triton's interpreter (test_interpreter.py starts it) on the kernels'.
"""

import functools

import pytest
import torch
from torch.autograd import forward_ad

import maskalign_kernels
from maskalign_kernels import runtime
from maskalign_kernels.adaln import naive as adaln_naive
from maskalign_kernels.mix_and_drop import naive as mix_naive
from maskalign_kernels.subset_cosine_alignment import naive as alignment_naive

B, N, D, K, T = 2, 6, 8, 3, 4
VECTOR = (B, D)
# Shapes of the tensors of an operation that have a gradient.
OPERATIONS = {
    "mix_and_drop": [(B, N, D), VECTOR, VECTOR, VECTOR, (T, N), (T,), (N, T), (N,)],
    "subset_cosine_alignment": [(B, K, D)],
    "subset_cosine_alignment_loss": [(B, K, D)],
    "adaln_modulate": [(B, N, D), VECTOR, VECTOR],
    "gated_residual": [(B, N, D), (B, K, D), VECTOR],
    "gated_residual_adaln": [(B, N, D), (B, K, D), VECTOR, VECTOR, VECTOR],
}
# On a CPU the adaLN operations are plain PyTorch, which has every derivative.
PLAIN = () if runtime.INTERPRET else ("adaln_modulate", "gated_residual", "gated_residual_adaln")
every_operation = pytest.mark.parametrize("operation", OPERATIONS)
every_refusal = pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in PLAIN])


@pytest.fixture
def problem(generator):
    """problem(operation) -> (scalar of the operation, scalar of its naive twin, the tensors with a gradient)."""

    def make(operation):
        tensors = [torch.randn(size, generator=generator) for size in OPERATIONS[operation]]
        subset = torch.rand(B, N, generator=generator).argsort(1)[:, :K]
        teacher = [torch.randn(B, N, D, generator=generator)] if operation.startswith("subset") else []
        twins = {"m": mix_naive, "s": alignment_naive}.get(operation[0], adaln_naive)

        def scalar(function, *tensors):
            out = function(*tensors, *teacher, subset)
            return sum((o * o.detach().cos()).sum() for o in (out if isinstance(out, tuple) else (out,)))

        functions = getattr(maskalign_kernels, operation), getattr(twins, operation)
        return *(functools.partial(scalar, function) for function in functions), tensors

    return make


def grad(function, tensors):
    return torch.func.grad(function, argnums=tuple(range(len(tensors))))(*tensors)


@every_operation
def test_first_derivatives(operation, problem, relative):
    """torch.func.grad, vjp, and grad of a module called functionally, against autograd on the naive twin."""
    function, twin, tensors = problem(operation)
    leaves = [t.double().requires_grad_() for t in tensors]
    exact = torch.autograd.grad(twin(*leaves), leaves)
    _, pull = torch.func.vjp(function, *tensors)
    for found in (grad(function, tensors), pull(torch.tensor(1.0))):
        for ours, true in zip(found, exact, strict=True):
            assert relative(ours, true) < 2e-5


@every_operation
def test_a_transform_around_other_things_changes_nothing(operation, problem):
    """The operation inside a vmap over something that it does not depend on."""
    function, _, tensors = problem(operation)
    alone = function(*tensors)
    scaled = torch.func.vmap(lambda factor: factor * function(*tensors))(torch.tensor([1.0, 2.0]))
    assert torch.equal(scaled, torch.stack([alone, 2 * alone]))


@pytest.mark.skipif(not PLAIN, reason="the kernels' path")
@pytest.mark.parametrize("operation", PLAIN)
def test_plain_lines_have_every_derivative(operation, problem, relative):
    function, twin, tensors = problem(operation)

    def again(f):
        return grad(lambda *t: sum(g.square().sum() for g in grad(f, t)), tensors)

    for ours, true in zip(again(function), again(twin), strict=True):
        assert relative(ours, true) < 2e-5


@every_refusal
def test_a_second_derivative_is_refused(operation, problem):
    """Not only by autograd, whose once_differentiable sees it: by torch.func, too, which would be given a wrong one."""
    function, _, tensors = problem(operation)
    with pytest.raises(NotImplementedError, match=f"^{operation[:10]}.*: a second derivative is not implemented.*$"):
        grad(lambda *t: sum(g.square().sum() for g in grad(function, t)), tensors)
    leaves = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative is not implemented"):
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)


@every_refusal
def test_vmap_is_refused(operation, problem):
    function, _, tensors = problem(operation)
    pairs = [torch.stack([t, t]) for t in tensors]
    refused = pytest.raises(NotImplementedError, match=r"torch\.func\.vmap is not implemented; pass the whole batch")
    with refused:
        torch.func.vmap(function)(*pairs)
    with refused:
        torch.func.vmap(torch.func.grad(function))(*pairs)
    with refused:
        torch.func.jacrev(function)(*tensors)


def test_vmap_over_the_subset_is_refused(generator):
    s, z = torch.randn(B, K, D, generator=generator), torch.randn(B, N, D, generator=generator)
    subsets = torch.rand(5, B, N, generator=generator).argsort(-1)[..., :K]
    with pytest.raises(NotImplementedError, match=r"torch\.func\.vmap is not implemented"):
        torch.func.vmap(lambda subset: maskalign_kernels.subset_cosine_alignment(s, z, subset))(subsets)


@every_refusal
def test_forward_mode_is_refused(operation, problem):
    """Without the refusal the kernels' path would answer with a tangent of zero."""
    function, _, tensors = problem(operation)
    with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented; use"):
        torch.func.jvp(function, tuple(tensors), tuple(torch.ones_like(t) for t in tensors))
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, torch.ones_like(t)) for t in tensors]
        with pytest.raises(NotImplementedError, match="forward-mode differentiation is not implemented"):
            function(*duals)
