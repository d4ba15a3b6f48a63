"""Random numbers that are a function of a key and of their position (row, column, stream).

Files in reading order: operations.py (what is computed, dispatch), naive.py (Philox in PyTorch, which is also the CPU
path), kernels.py (the Triton kernel and its launch).
"""

from .operations import keyed_random

__all__ = ["keyed_random"]
