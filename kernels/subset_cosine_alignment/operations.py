"""Cosine similarity of student tokens with teacher tokens on a subset of the tokens, and the loss made of it."""

from typing import Union

import torch

from ..rows import rows_contiguous
from ..runtime import (
    FLOATS,
    INDICES,
    check_interpretable,
    check_subset,
    check_tensor,
    fail,
    use_triton,
)
from . import cpu

OP = "subset_cosine_alignment"


def _check(op, student, teacher, subset, student_is_subset, eps):
    """Raise a ValueError for arguments that do not fit; returns them with dense rows (pitch between rows is
    kept).
    """
    sizes = {}
    floats = (*FLOATS, torch.float64)
    check_tensor(op, "teacher", teacher, "BNC", sizes, (*floats, torch.int8))
    if sizes["C"] == 0:
        fail(op, "teacher", teacher, "at least one channel")
    check_tensor(op, "subset", subset, "BK", sizes, INDICES, teacher.device)
    check_tensor(op, "student", student, "BKC" if student_is_subset else "BNC", sizes, floats, teacher.device)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; expected a number >= 0")
    if teacher.requires_grad and torch.is_grad_enabled():
        fail(op, "teacher", teacher, "no gradient: the teacher is frozen, pass teacher.detach()")
    # Only where two cosines would share one student row do duplicates matter.
    check_subset(op, subset, sizes["N"], distinct=not student_is_subset)
    return rows_contiguous(student), rows_contiguous(teacher)


def subset_cosine_alignment(
    student: torch.Tensor,
    teacher: torch.Tensor,
    subset: torch.Tensor,
    *,
    student_is_subset: bool = True,
    eps: float = 1e-12,
) -> torch.Tensor:
    """Cosine of student and teacher rows on a subset of the tokens; its negative mean is REPA's alignment
    loss.

    Differentiable with respect to `student` alone (once; the teacher is frozen).

    Args:
        student: (B, K, C) bfloat16, float16 or float32, row for row with `subset`; or (B, N, C), rows to be
            gathered, with student_is_subset=False, whose gradient is zero outside the subset. float64 on the
            CPU only.
        teacher: (B, N, C) of the same types or int8 (the cosine ignores the scale of a row, so int8 rows need
            none). Rows of either tensor may lie at any pitch (views); nothing is copied as long as a row is
            dense.
        subset: (B, K) int32 or int64 token indices in [0, N), 0 <= K. Sorted or not; no duplicates when rows
            are gathered.
        student_is_subset: how the rows of `student` are laid out.
        eps: smallest norm to divide by, as in torch.nn.functional.normalize.

    Returns:
        (B, K) float32 (float64 where an argument is).

    Raises:
        ValueError: an argument's type, shape or device does not fit, the teacher requires a gradient, or (on
            the CPU, and on a GPU with MASKALIGN_KERNELS_DEBUG=1) an index is out of range or repeated where
            it matters.
    """
    student, teacher = _check(OP, student, teacher, subset, student_is_subset, eps)
    if not use_triton(student, teacher, subset):
        return cpu.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)
    check_interpretable(OP, student=student, teacher=teacher)
    from .launch import cosine  # Triton and PyTorch's compiler: seconds to import.

    return cosine(student, teacher, subset, student_is_subset, float(eps))[0]


def subset_cosine_alignment_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    subset: torch.Tensor,
    *,
    weight: Union[float, torch.Tensor] = 1.0,
    student_is_subset: bool = True,
    eps: float = 1e-12,
) -> torch.Tensor:
    """The alignment loss -mean(weight * cosine) over all B x K tokens, with the mean and the weight inside
    the kernels.

    One launch reads the rows and leaves one sum per program, a second one adds those in a fixed order, so the
    result is the same on every run. The mean over no tokens at all (K = 0) is zero here, not NaN.

    Args:
        weight: a number, or a tensor of shape (B,), one weight per image (no gradient flows to it).
        student, teacher, subset, student_is_subset, eps: as in `subset_cosine_alignment`.

    Returns:
        a float32 scalar (float64 where an argument is).
    """
    op = f"{OP}_loss"
    student, teacher = _check(op, student, teacher, subset, student_is_subset, eps)
    per_image, scale = None, weight
    if isinstance(weight, torch.Tensor):
        check_tensor(op, "weight", weight, "B", {"B": subset.shape[0]}, (*FLOATS, torch.float64), subset.device)
        if weight.requires_grad and torch.is_grad_enabled():
            fail(op, "weight", weight, "no gradient: pass weight.detach()")
        per_image, scale = weight.contiguous(), 1.0
    if not use_triton(student, teacher, subset):
        cosine = cpu.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)
        if cosine.numel() == 0:
            return cosine.sum()
        return -scale * (cosine if per_image is None else cosine * per_image.unsqueeze(1)).mean()
    check_interpretable(op, student=student, teacher=teacher, weight=per_image)
    from .launch import loss

    if torch.compiler.is_compiling():
        # A number that changes from step to step is symbolic in a graph; there the product costs nothing
        # either.
        return scale * loss(student, teacher, subset, per_image, 1.0, student_is_subset, float(eps))[0]
    return loss(student, teacher, subset, per_image, float(scale), student_is_subset, float(eps))[0]
