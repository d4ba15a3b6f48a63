"""Mixing and dropping written as its formula, with PyTorch's autograd: the reference for the CPU path and the kernels.

The benchmarks also compare with this code: it mixes all rows and gathers the kept ones afterwards.
"""

import torch
import torch.nn.functional as F


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None):
    """Rows `subset` of x + gate * (w2 @ gelu(w1 @ (LayerNorm(x) * (1 + scale) + shift) + b1) + b2)."""
    u = F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    hidden = F.gelu(torch.matmul(w1, u) + b1.unsqueeze(-1), approximate="tanh")
    y = x + gate.unsqueeze(1) * (torch.matmul(w2, hidden) + b2.unsqueeze(-1))
    return y if subset is None else torch.take_along_dim(y, subset.long().unsqueeze(-1), dim=1)
