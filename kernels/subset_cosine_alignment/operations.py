"""Cosine similarity of student and teacher tokens on a subset of the tokens, and the alignment loss."""

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
    """Check the arguments, raising ValueError, and return student and teacher with dense rows (of any stride)."""
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
    # Duplicates matter only where two cosines would share one student row.
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
    """Cosine of student and teacher rows on a subset of the tokens; its negative mean is REPA's alignment loss.

    Differentiable only with respect to `student` (the teacher is frozen), and only once.

    Args:
        student: (B, K, C) bfloat16, float16 or float32, on the CPU also float64, where row k belongs to token
            subset[:, k]. With student_is_subset=False, (B, N, C), from which the rows of the subset are gathered; the
            gradient is then zero outside the subset.
        teacher: (B, N, C) of the same dtypes or int8. The cosine does not depend on the scale of a row, so int8 rows
            need no scale. Rows of either tensor may have any stride (views); dense rows are not copied.
        subset: (B, K) int32 or int64 token indices in [0, N), in any order; K may be 0. Without duplicates if student
            rows are gathered.
        student_is_subset: whether `student` has only the rows of the subset.
        eps: smallest norm to divide by, as in torch.nn.functional.normalize.

    Returns:
        (B, K) float32 (float64 where an argument is).

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, the teacher requires a gradient, or an index is
            out of range or repeated where student rows are gathered (checked on the CPU, and on a GPU with
            MASKALIGN_KERNELS_DEBUG=1).
    """
    student, teacher = _check(OP, student, teacher, subset, student_is_subset, eps)
    if not use_triton(student, teacher, subset):
        return cpu.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)
    check_interpretable(OP, student=student, teacher=teacher)
    from .launch import cosine  # Triton and PyTorch's compiler, which take seconds to import.

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
    """The alignment loss -mean(weight * cosine) over all B x K tokens, with the mean and the weight inside the kernels.

    One launch reads the rows and writes one sum per program, and a second one adds these in a fixed order, so the
    result is reproducible bit for bit. For K = 0 the loss is zero, not NaN.

    Args:
        weight: a number, or a tensor of shape (B,) with one weight per image, which must not require a gradient.
        student, teacher, subset, student_is_subset, eps: as in `subset_cosine_alignment`.

    Returns:
        a float32 scalar (float64 where an argument is).

    Raises:
        ValueError: as `subset_cosine_alignment`, or the weight has the wrong shape, dtype or device or requires a
            gradient.
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
        # A number that changes between steps is symbolic in a graph, and the product is fused there.
        return scale * loss(student, teacher, subset, per_image, 1.0, student_is_subset, float(eps))[0]
    return loss(student, teacher, subset, per_image, float(scale), student_is_subset, float(eps))[0]
