"""The operations of an adaLN-Zero block between its matrix products, each in one pass over the tokens.

Files in reading order: operations.py (what is computed, checks, dispatch), naive.py (the formulas, which are also the
CPU path), kernels.py (Triton), launch.py (configurations, launches, `torch.library.triton_op` with gradient), cases.py
(bytes and FLOPs of each launch for the report).
"""

from .operations import adaln_modulate, gated_residual, gated_residual_adaln

__all__ = ["adaln_modulate", "gated_residual", "gated_residual_adaln"]
