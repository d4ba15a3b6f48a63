"""The cosine alignment written as its formula, with PyTorch's autograd: the reference for the CPU path and the kernels.

The benchmarks also compare with this code: it gathers, normalizes and multiplies copies of the rows.
"""

import torch
import torch.nn.functional as F


def subset_cosine_alignment(student, teacher, subset, *, student_is_subset=True, eps=1e-12):
    """The cosine of student row and teacher row for the tokens `subset`: (B, K), in the dtype of the student."""
    index = subset.long().unsqueeze(-1)
    s = student if student_is_subset else torch.take_along_dim(student, index, dim=1)
    t = torch.take_along_dim(teacher, index, dim=1).to(s.dtype)
    return (F.normalize(s, dim=-1, eps=eps) * F.normalize(t, dim=-1, eps=eps)).sum(-1)


def subset_cosine_alignment_loss(student, teacher, subset, *, weight=1.0, student_is_subset=True, eps=1e-12):
    """-mean(weight * cosine), a scalar; `weight` is a number or a tensor (B,)."""
    cosine = subset_cosine_alignment(student, teacher, subset, student_is_subset=student_is_subset, eps=eps)
    return -(torch.as_tensor(weight).reshape(-1, 1) * cosine).mean()
