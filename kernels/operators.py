"""Shared by the operations where Triton runs: how kernels are launched and registered as operators of PyTorch.

This module is imported with the first call that runs kernels, because `torch.library.triton_op` imports PyTorch's
compiler. Under torch.compile that import happens while the call is traced.
"""

import functools

import torch
import triton
import triton.language as tl

from .runtime import INTERPRET, is_abstract

__all__ = ["WARP_SIZE", "kernel_op", "tl", "triton", "wrap_triton"]

# Lanes of a warp (NVIDIA) or wave (AMD Instinct). Configurations are given in threads, so tiles are equal on both.
WARP_SIZE = 64 if torch.version.hip else 32

_tracing_shapes = False


def kernel_op(name):
    """Decorator: `torch.library.triton_op` for a function that allocates its outputs and launches kernels.

    The function itself serves as the fake kernel, so it must only allocate, view and launch. Interpreted kernels cannot
    be traced into a graph, so under TRITON_INTERPRET=1 the same function becomes an opaque custom operator with the
    same schema, whose fake kernel is the function with its launches left out.
    """

    def decorate(function):
        if not INTERPRET:
            return torch.library.triton_op(name, _on_its_device(function), mutates_args=())
        op = torch.library.custom_op(name, function, mutates_args=())

        def fake(*args, **kwargs):
            global _tracing_shapes
            _tracing_shapes = True
            try:
                return function(*args, **kwargs)
            finally:
                _tracing_shapes = False

        op.register_fake(fake)
        return op

    return decorate


def _on_its_device(function):
    """The function, run with the device of its first argument as the current one, on which Triton launches."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        first = args[0]
        if is_abstract(first) or first.device.type != "cuda" or first.device.index == torch.cuda.current_device():
            return function(*args, **kwargs)
        with torch.cuda.device(first.device):
            return function(*args, **kwargs)

    return guarded


class _NoLaunch:
    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def wrap_triton(kernel):
    """`torch.library.wrap_triton`, extended to interpreted kernels for every supported version of PyTorch."""
    if _tracing_shapes:
        return _NoLaunch()
    return kernel if INTERPRET else torch.library.wrap_triton(kernel)
