"""The operations of the method and of its blocks as Triton kernels, each with its plain PyTorch twin.

A folder per operation. CUDA and ROCm tensors run the kernels, CPU tensors run PyTorch (see runtime.use_triton); callers
never branch. This package imports nothing of `maskalign`.
"""

from .adaln import adaln_modulate, gated_residual, gated_residual_adaln
from .keyed_random import keyed_random
from .mix_and_drop import mix_and_drop
from .subset_cosine_alignment import subset_cosine_alignment, subset_cosine_alignment_loss

__all__ = [
    "adaln_modulate",
    "gated_residual",
    "gated_residual_adaln",
    "keyed_random",
    "mix_and_drop",
    "subset_cosine_alignment",
    "subset_cosine_alignment_loss",
]
