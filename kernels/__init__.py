"""The operations of the method and of its blocks as Triton kernels, each with an equivalent in plain PyTorch.

Each operation has its own folder. CUDA and ROCm tensors run the kernels and CPU tensors run PyTorch (see
runtime.use_triton), so callers never branch. This package does not import `maskalign`.
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
