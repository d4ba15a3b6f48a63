"""Random numbers that are a function of a key and of their place.

Files in reading order: operations.py (what is computed, dispatch), naive.py (Philox in PyTorch, which is also the CPU
path), kernels.py (Triton, and its launch).
"""

from .operations import keyed_random

__all__ = ["keyed_random"]
