"""The three operations written as their formulas. CPU tensors run this code, with PyTorch's autograd.

The order of operations is that of a plain SiT block, so on a CPU a model's results are bit for bit the same with these
functions as without them.
"""

import torch
import torch.nn.functional as F

from ..rows import gather_rows

EPS = 1e-6


def adaln_modulate(x, shift, scale, subset=None, dtype=None):
    """LayerNorm(x[subset]) * (1 + scale) + shift, in `dtype` (that of x where it is None)."""
    rows = x if subset is None else gather_rows(x, subset)
    normed = F.layer_norm(rows, rows.shape[-1:], eps=EPS)
    return torch.addcmul(shift.unsqueeze(1), normed, 1 + scale.unsqueeze(1)).to(dtype or x.dtype)


def gated_residual(x, branch, gate, subset=None):
    """x[subset] + gate * branch, in x's dtype."""
    rows = x if subset is None else gather_rows(x, subset)
    return torch.addcmul(rows, gate.unsqueeze(1), branch).to(x.dtype)


def gated_residual_adaln(x, branch, gate, shift, scale, subset=None, dtype=None):
    """y = gated_residual(x, branch, gate, subset), and adaln_modulate(y, shift, scale)."""
    y = gated_residual(x, branch, gate, subset)
    return y, adaln_modulate(y, shift, scale, dtype=dtype)
