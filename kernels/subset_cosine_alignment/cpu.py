"""The CPU path of subset_cosine_alignment: the same result as naive.py, with fewer passes over memory.

Training on a CPU uses this code. Unlike naive.py, the forward saves only the inputs and three scalars per token for the
backward, and products overwrite gathered copies instead of allocating memory.
"""

import torch

from ..rows import gather_rows
from ..transforms import applying, first_gradient


def _cosine(s, t, s_eps, t_eps):
    """(cosine, 1/|s|, 1/|t|, cosine or 0 where |s| < eps) of rows s and t (B, K, C); each (B, K). Overwrites t."""
    s_norm = torch.linalg.vector_norm(s, dim=-1)
    s_inverse = s_norm.clamp_min(s_eps).reciprocal()
    t_inverse = torch.linalg.vector_norm(t, dim=-1).clamp_min(t_eps).reciprocal()
    cosine = t.mul_(s).sum(-1) * s_inverse * t_inverse  # vecdot would allocate memory for the product.
    # As in F.normalize, a norm below eps is replaced by eps, a constant: the gradient has no component along the row.
    return cosine, s_inverse, t_inverse, torch.where(s_norm < s_eps, 0, cosine)


def _cosine_of_large_rows(s, t, eps):
    """`_cosine` for rows whose squares may overflow: a row is divided by its largest element if that exceeds 1."""
    s_largest, t_largest = (rows.abs().amax(-1).clamp_min(1) for rows in (s, t))
    s, t = s / s_largest.unsqueeze(-1), t / t_largest.unsqueeze(-1)
    cosine, s_inverse, t_inverse, along = _cosine(s, t, eps / s_largest, eps / t_largest)
    return cosine, s_inverse / s_largest, t_inverse / t_largest, along


class SubsetCosineAlignment(torch.autograd.Function):
    """Saves the inputs and three scalars per token for the backward, and no normalized, gathered or converted copy."""

    @staticmethod
    def forward(student, teacher, subset, student_is_subset, eps):
        dtype = torch.promote_types(student.dtype, torch.float32)
        if teacher.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, teacher.dtype)
        s = (student if student_is_subset else gather_rows(student, subset)).to(dtype)
        t = gather_rows(teacher, subset).to(dtype)  # A copy, which is overwritten.
        if torch.compiler.is_compiling():  # The passes are fused, and the graph cannot branch.
            return _cosine_of_large_rows(s, t, eps)
        result = _cosine(s, t, eps, eps)
        if not bool((result[1] * result[2]).all()):
            # A square above 3.4e38 has made a norm infinite. Only such rows, which a normal run does not have, cost a
            # second pass.
            result = _cosine_of_large_rows(s, gather_rows(teacher, subset).to(dtype), eps)
        return result

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, subset, ctx.student_is_subset, _ = inputs
        _, s_inverse, t_inverse, along = output
        ctx.mark_non_differentiable(s_inverse, t_inverse, along)
        ctx.save_for_backward(student, teacher, subset, s_inverse, t_inverse, along)

    @staticmethod
    def backward(ctx, grad, *_):
        return _first_gradient(grad, *ctx.saved_tensors, ctx.student_is_subset), None, None, None, None


def _gradient(grad, student, teacher, subset, s_inverse, t_inverse, along, student_is_subset):
    """The gradient of the student."""
    s = (student if student_is_subset else gather_rows(student, subset)).to(s_inverse.dtype)
    grad_s = gather_rows(teacher, subset).to(s_inverse.dtype)  # A copy, which is overwritten below.
    scale = grad * s_inverse
    if torch.compiler.is_compiling() or bool((s_inverse * torch.minimum(s_inverse, t_inverse) < 1e-30).any()):
        # This order avoids the product of two inverses of large norms, which would underflow to 0.
        grad_s.mul_(t_inverse.unsqueeze(-1)).addcmul_(s, (s_inverse * along).unsqueeze(-1), value=-1)
        grad_s.mul_(scale.unsqueeze(-1))
    else:
        grad_s.mul_((scale * t_inverse).unsqueeze(-1))
        grad_s.addcmul_(s, (scale * s_inverse * along).unsqueeze(-1), value=-1)
    grad_s = grad_s.to(student.dtype)
    if not student_is_subset:
        index = subset.long().unsqueeze(-1).expand_as(grad_s)
        grad_s = torch.zeros_like(student).scatter_add_(1, index, grad_s)
    return grad_s


_apply = applying("subset_cosine_alignment", SubsetCosineAlignment)
# A second derivative would silently omit the terms through the saved scalars, so it raises an error.
_first_gradient = first_gradient("subset_cosine_alignment", _gradient)


def subset_cosine_alignment(student, teacher, subset, student_is_subset=True, eps=1e-12):
    """Cosines (B, K), float32, or float64 where student or teacher is. Arguments as in operations.py."""
    return _apply(student, teacher, subset, student_is_subset, eps)[0]
