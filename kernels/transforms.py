"""Behavior of the operations under torch.func and second derivatives.

`torch.func.grad` and `torch.func.vjp` work through every operation. Second derivatives, `torch.func.vmap` and
forward-mode differentiation are not implemented and raise a NotImplementedError. Without this file some of them would
be silently wrong: `torch.autograd.function.once_differentiable` does not detect a second derivative under torch.func,
and a custom operator of PyTorch has no tangent in forward mode.
"""

import functools

import torch
from torch.autograd import forward_ad


def transformed():
    """Whether the call runs inside a transform of torch.func or forward-mode differentiation. False in a graph."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class _Refusing(torch.autograd.Function):
    """Mixin whose vmap and jvp raise a one-line error. torch.compile rejects an autograd function that has a vmap."""

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
    """A function that calls `function.apply`, and that raises a one-line error under vmap and forward mode.

    Args:
        operation: the name of the public function, for the error.
        function: subclass of torch.autograd.Function with a setup_context.
    """
    refusing = type(function.__name__, (_Refusing, function), {"OPERATION": operation})

    def call(*args):
        return refusing.apply(*args) if transformed() else function.apply(*args)

    return call


def differentiable(operation, op, backward, setup_context):
    """Register the gradient of a custom operator, and return a function that calls it.

    The gradient registered with a custom operator does not support torch.func. Inside its transforms, the operator
    therefore runs in an autograd function with the same gradient.

    Args:
        operation: the name of the public function, for errors.
        op: the custom operator.
        backward, setup_context: as for `op.register_autograd`.
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
    """Wrap `function`, which computes an operation's gradients, so that differentiating it raises a one-line error.

    Args:
        operation: the name of the public function, for the error.
        function: returns the gradients of the operation's arguments.
    """

    class Gradient(_Refusing):
        OPERATION = operation

        @staticmethod
        def forward(*args):
            return function(*args)

        @staticmethod
        def setup_context(ctx, inputs, output):
            """Saves nothing: the backward only raises."""

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
