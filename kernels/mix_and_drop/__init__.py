"""Token mixing fused with the row gather: only the kept rows of the mixed tokens are written.

Files in reading order: operations.py (what is computed, checks, dispatch), naive.py (the formula), cpu.py (the
optimized CPU path), kernels.py (Triton), launch.py (configurations, launches, `torch.library.triton_op` with gradient),
cases.py (bytes and FLOPs of each launch for the report).
"""

from .operations import mix_and_drop

__all__ = ["mix_and_drop"]
