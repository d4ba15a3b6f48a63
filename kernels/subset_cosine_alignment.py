"""Cosine similarity of student tokens with teacher tokens on a subset of the tokens."""

from . import reference


def subset_cosine_alignment(student, teacher, subset, *, student_is_subset=True, eps=1e-12):
    return reference.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)


def subset_cosine_alignment_loss(student, teacher, subset, *, weight=1.0, student_is_subset=True, eps=1e-12):
    return -weight * subset_cosine_alignment(
        student, teacher, subset, student_is_subset=student_is_subset, eps=eps
    ).mean()
