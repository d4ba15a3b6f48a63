"""Cosine similarity of student and teacher tokens on a subset of the tokens, and the alignment loss.

Files in reading order: operations.py (what is computed, checks, dispatch), naive.py (the formula), cpu.py (the
optimized CPU path), kernels.py (Triton), launch.py (configurations, launches, `torch.library.triton_op` with gradient),
cases.py (bytes and FLOPs of each launch for the report).
"""

from .operations import subset_cosine_alignment, subset_cosine_alignment_loss

__all__ = ["subset_cosine_alignment", "subset_cosine_alignment_loss"]
