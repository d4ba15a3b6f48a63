"""How the operations meet torch.func and a second derivative.

`torch.func.grad` and `torch.func.vjp` work through every operation. What has no formula here (second derivatives,
`torch.func.vmap`, forward-mode differentiation) raises one line that says so. Without this file some of it would be
silently wrong: `torch.autograd.function.once_differentiable` does not notice a second derivative under torch.func, and
a custom operator of PyTorch gives forward mode no tangent.
"""

import functools

import torch
from torch.autograd import forward_ad


def transformed():
    """Whether a transform of torch.func, or forward-mode differentiation, is around the call. False in a graph."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Refusing(torch.autograd.Function):
    """What an autograd function lacks, said in one line. Not for torch.compile, which takes no function with a vmap."""

    OPERATION = ""

    @classmethod
    def vmap(cls, info, in_dims, *args):
        _refuse(cls.OPERATION, "torch.func.vmap", "pass the whole batch in one call")

    @classmethod
    def jvp(cls, ctx, *tangents):
        _refuse(cls.OPERATION, "forward-mode differentiation", "use torch.func.vjp or autograd")


def _refuse(operation, what, instead):
    raise NotImplementedError(f"{operation}: {what} is not implemented; {instead}")


def applying(operation, function):
    """A function that calls `function.apply`, and that refuses in one line what the autograd function lacks.

    Args:
        operation: the public function that errors name.
        function: subclass of torch.autograd.Function with a setup_context.
    """
    refusing = type(function.__name__, (_Refusing, function), {"OPERATION": operation})

    def call(*args):
        return refusing.apply(*args) if transformed() else function.apply(*args)

    return call


def differentiable(operation, op, backward, setup_context):
    """Register the gradient of a custom operator, and return a function that calls it.

    A custom operator's own gradient knows no torch.func: there the operator runs inside an autograd function with the
    same gradient.
    """
    op.register_autograd(backward, setup_context=setup_context)

    class Twin(_Refusing):
        OPERATION = operation

        @staticmethod
        def forward(*args):
            return op(*args)

    Twin.setup_context, Twin.backward = staticmethod(setup_context), staticmethod(backward)

    def call(*args):
        return Twin.apply(*args) if transformed() else op(*args)

    return call


def first_gradient(operation, function):
    """`function`, which computes an operation's gradients; where it is differentiated in its turn, one line says that
    there is no second derivative.
    """

    class Gradient(_Refusing):
        OPERATION = operation

        @staticmethod
        def forward(*args):
            return function(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            """There is nothing to keep."""

        @staticmethod
        def backward(ctx, *grads):
            _refuse(operation, "a second derivative", "use the formula in naive.py")

    @functools.wraps(function)
    def call(*args):
        if torch.compiler.is_compiling():
            return function(*args)
        again = torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)
        return Gradient.apply(*args) if again or transformed() else function(*args)

    return call
