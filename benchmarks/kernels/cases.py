"""The cases of `benchmarks.kernels` on any device: arguments, providers, precision, and the error of a result.

The providers are `kernel` (maskalign_kernels: Triton on a GPU, PyTorch on a CPU), `eager` (the chain of PyTorch
operations as in training codes, from benchmarks.kernel_report), and `compiled` (torch.compile of the same chain).
"""

import contextlib
import functools

import torch

from benchmarks import kernel_report
from maskalign_kernels import (
    adaln_modulate,
    gated_residual,
    gated_residual_adaln,
    mix_and_drop,
    subset_cosine_alignment,
)

DIRECTIONS = ("forward", "backward", "both")
PROVIDERS = ("kernel", "eager", "compiled")


def label(operation, shape):
    """The name in the tables of one of the operation's SHAPES."""
    return next(iter(kernel_report.CASES[operation].aot_cases([shape], every_configuration=False))).shape


def default_launches(operation, shape):
    """The report's cases of the operation's launches on one of SHAPES in their default configurations."""
    cases = kernel_report.CASES[operation].aot_cases([shape], every_configuration=False)
    return [case for case in cases if case.operation == operation and not case.launch.startswith("gathered")]


def alignment_setup(shape, device):
    """(arguments, differentiable arguments, {provider: function}) of one of SHAPES."""
    images, tokens, kept, width, student, teacher = shape
    s = torch.randn(images, kept, width, device=device).to(student).requires_grad_()
    z = torch.randn(images, tokens, width, device=device)
    z = (z * 40).round().clamp(-127, 127).to(teacher) if teacher == torch.int8 else z.to(teacher)
    subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values

    chain = kernel_report.unfused_alignment
    return (s, z, subset), [s], {"kernel": subset_cosine_alignment, "eager": chain, "compiled": torch.compile(chain)}


def mix_setup(shape, device):
    """As alignment_setup, for mix_and_drop: tokens and vectors in the shape's first dtype, weights in its second."""
    images, tokens, kept, width, hidden, x, weight, _ = shape
    sizes = [(images, tokens, width), *[(images, width)] * 3, (hidden, tokens), (hidden,), (tokens, hidden), (tokens,)]
    scales = [1, 1, 0.3, 1, tokens**-0.5, 0.1, hidden**-0.5, 0.1]
    dtypes = [x] * 4 + [weight] * 4
    tensors = [
        (torch.randn(size, device=device) * by).to(dtype).requires_grad_()
        for size, by, dtype in zip(sizes, scales, dtypes, strict=True)
    ]
    subset = None
    if kept is not None:
        subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    chain = kernel_report.unfused_mix
    return (*tensors, subset), tensors, {"kernel": mix_and_drop, "eager": chain, "compiled": torch.compile(chain)}


def adaln_setup(operation, shape, device):
    """As alignment_setup, for one of the adaLN operations: x in the shape's first dtype, the rest in its second."""
    images, tokens, kept, width, x, other = shape
    chain, branches, vectors = kernel_report.UNFUSED_ADALN[operation]
    sizes = [(images, tokens, width), *[(images, kept or tokens, width)] * branches, *[(images, width)] * vectors]
    dtypes = [x] + [other] * (len(sizes) - 1)
    tensors = [torch.randn(s, device=device).to(d).requires_grad_() for s, d in zip(sizes, dtypes, strict=True)]
    subset = None
    if kept is not None:
        subset = torch.rand(images, tokens, device=device).argsort(1)[:, :kept].sort(1).values
    ours = {f.__name__: f for f in (adaln_modulate, gated_residual, gated_residual_adaln)}[operation]
    return (*tensors, subset), tensors, {"kernel": ours, "eager": chain, "compiled": torch.compile(chain)}


SETUPS = {"subset_cosine_alignment": alignment_setup, "mix_and_drop": mix_setup}
SETUPS |= {name: functools.partial(adaln_setup, name) for name in kernel_report.UNFUSED_ADALN}


def precision(operation, shape, device):
    """Autocast to the products' dtype if weights or tokens have another one; else a context without effect."""
    dtypes = {"subset_cosine_alignment": (), "mix_and_drop": shape[5:]}.get(operation, shape[4:])
    return torch.autocast(device.type, dtypes[-1]) if len(set(dtypes)) > 1 else contextlib.nullcontext()


def relative_error(function, exact, arguments, leaves):
    """The larger relative error of the result and the gradients, compared with the chain in float64."""

    def outcome(function, arguments, leaves):
        outs = kernel_report.outputs(function(*arguments))
        weights = torch.linspace(-1, 1, outs[0].numel(), device=outs[0].device, dtype=torch.float64)
        return [*outs, *torch.autograd.grad(outs, leaves, [weights.view(o.shape).to(o.dtype) for o in outs])]

    wide = [
        a.detach().double().requires_grad_(a.requires_grad)
        if isinstance(a, torch.Tensor) and (a.is_floating_point() or a.dtype == torch.int8) else a
        for a in arguments
    ]  # fmt: skip
    with torch.autocast(arguments[0].device.type, enabled=False):
        truths = outcome(exact, wide, [a for a in wide if isinstance(a, torch.Tensor) and a.requires_grad])
    found = outcome(function, arguments, leaves)
    with torch.no_grad():
        return max(float((f.double() - t).norm() / t.norm()) for f, t in zip(found, truths, strict=True))


def tolerated_error(shape, leaves):
    """The largest allowed relative error of a result: a few roundings in the narrowest dtype of the chain."""
    dtypes = [t.dtype for t in leaves] + [d for d in shape[5:] if d.is_floating_point]
    return 8 * max(torch.finfo(dtype).eps for dtype in dtypes) + 2e-3
