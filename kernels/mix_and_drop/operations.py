"""Token mixing fused with the row gather: only the kept rows of the mixed tokens are written."""

from typing import Optional

import torch

from ..rows import rows_contiguous
from ..runtime import FLOATS, INDICES, check_interpretable, check_subset, check_tensor, use_triton
from . import cpu

OP = "mix_and_drop"
# A tile of a wider hidden layer does not fit in registers. It takes the CPU path on a GPU too, as does an empty one.
MAX_HIDDEN = 256


def mix_and_drop(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    gate: torch.Tensor,
    w1: torch.Tensor,
    b1: torch.Tensor,
    w2: torch.Tensor,
    b2: torch.Tensor,
    subset: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Rows `subset` of x + gate * (w2 @ gelu(w1 @ (LayerNorm(x) * (1 + scale) + shift) + b1) + b2).

    The products run along the tokens, so every kept token depends on all tokens (the token mixing of MLP-Mixer, arXiv
    2105.01601, modulated as in DiT's adaLN-Zero, arXiv 2212.09748). LayerNorm has no affine parameters and eps 1e-6;
    GELU is the tanh form.

    Args:
        x: (B, N, D) tokens; bfloat16, float16 or float32, on the CPU also float64. Rows may have any stride.
        shift, scale, gate: (B, D), any of these dtypes.
        w1, b1, w2, b2: (T, N), (T,), (N, T), (N,), any of these dtypes. The matrix products run in x's dtype, or in
            autocast's where autocast is enabled, and accumulate in float32.
        subset: (B, K) int32 or int64, distinct indices in [0, N) in any order; None keeps all N tokens.

    Returns:
        (B, K, D) in x's dtype, rows in the order of `subset`; (B, N, D) where subset is None.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or an index is outside [0, N) or repeated in a row
            of `subset` (checked on the CPU, and on a GPU with MASKALIGN_KERNELS_DEBUG=1).
    """
    sizes = {}
    floats = (*FLOATS, torch.float64)
    check_tensor(OP, "x", x, "BND", sizes, floats)
    for name, tensor in (("shift", shift), ("scale", scale), ("gate", gate)):
        check_tensor(OP, name, tensor, "BD", sizes, floats, x.device)
    for name, tensor, dims in (("w1", w1, "TN"), ("b1", b1, "T"), ("w2", w2, "NT"), ("b2", b2, "N")):
        check_tensor(OP, name, tensor, dims, sizes, floats, x.device)
    if subset is not None:
        check_tensor(OP, "subset", subset, "BK", sizes, INDICES, x.device)
        check_subset(OP, subset, sizes["N"], distinct=True)
    product_dtype = x.dtype
    device = x.device.type
    # The meta device has no autocast. torch 2.11 cannot trace torch.amp.is_autocast_available.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        product_dtype = torch.get_autocast_dtype(device)
    if not use_triton(x) or not 0 < sizes["T"] <= MAX_HIDDEN:
        return cpu.mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset, product_dtype)
    check_interpretable(OP, x=x, shift=shift, scale=scale, gate=gate, w1=w1, b1=b1, w2=w2, b2=b2)
    x, shift, scale, gate = map(rows_contiguous, (x, shift, scale, gate))
    w1, b1, w2, b2 = w1.contiguous(), b1.contiguous(), w2.contiguous(), b2.contiguous()
    subset = None if subset is None else rows_contiguous(subset)
    from .launch import mix  # Triton and PyTorch's compiler, which take seconds to import.

    return mix(x, shift, scale, gate, w1, b1, w2, b2, subset, product_dtype)[0]
