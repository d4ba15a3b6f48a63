"""Representation alignment: L_align = -mean cos(projector(h_S), z_S) (REPA, arXiv 2410.06940, eq. 8, on a subset S)."""

import torch

from maskalign_kernels import subset_cosine_alignment_loss


def alignment_loss(aligned, teachers, index):
    """Negative cosine similarity, averaged over tokens, images and teachers.

    Args:
        aligned: one (B, n, Dz) per teacher, the projected student tokens.
        teachers: one (B, N, Dz) per teacher, floating or int8, on the student's token grid.
        index: (B, n) integers, the token of each student row; None if n = N and the rows are in order.

    Returns:
        0-d float32 (float64 if the rows are).
    """
    if index is None:
        batch, tokens = aligned[0].shape[:2]
        index = torch.arange(tokens, device=aligned[0].device).expand(batch, tokens)
    losses = [subset_cosine_alignment_loss(z, teacher, index) for z, teacher in zip(aligned, teachers, strict=True)]
    return torch.stack(losses).mean()
