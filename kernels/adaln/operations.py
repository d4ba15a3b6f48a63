"""LayerNorm with adaLN's modulation, and the gated residual before it, on all tokens or on a subset."""

from typing import Optional, Tuple

import torch

from ..rows import rows_contiguous
from ..runtime import FLOATS, INDICES, check_interpretable, check_subset, check_tensor, use_triton
from . import naive

# A longer row does not fit in the registers of one program, so it takes the naive path on a GPU too.
MAX_WIDTH = 4096


def adaln_modulate(
    x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, subset: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Rows `subset` of LayerNorm(x) * (1 + scale) + shift.

    LayerNorm has no affine parameters and eps 1e-6. The modulation is that of DiT's adaLN (arXiv 2212.09748). Only the
    rows of the subset are read, and the backward computes the gradients of x, shift and scale in one pass.

    Args:
        x: (B, N, D) tokens; bfloat16, float16 or float32, on the CPU also float64. Rows may have any stride.
        shift, scale: (B, D), any of these dtypes.
        subset: (B, K) int32 or int64, distinct indices in [0, N) in any order; None takes all N rows.

    Returns:
        (B, K, D), rows in the order of `subset`; (B, N, D) where subset is None. The dtype is that of x, or autocast's
        where autocast is enabled, because a matrix product follows.

    Raises:
        ValueError: an argument has the wrong shape, dtype or device, or an index is outside [0, N) or repeated in a row
            of `subset` (checked on the CPU, and on a GPU with MASKALIGN_KERNELS_DEBUG=1).
    """
    tensors = {"x": x, "shift": shift, "scale": scale}
    if not _runs_kernels("adaln_modulate", tensors, subset):
        return naive.adaln_modulate(x, shift, scale, subset, _product_dtype(x))
    from .launch import modulate  # Triton and PyTorch's compiler, which take seconds to import.

    x, shift, scale = map(rows_contiguous, (x, shift, scale))
    return modulate(x, shift, scale, _dense_subset(subset), _product_dtype(x))[0]


def gated_residual(
    x: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor, subset: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """Rows `subset` of x, plus gate * branch.

    The gradient of x is zero outside the subset. It is written in the same pass as the gradients of branch and gate.

    Args:
        x: (B, N, D) tokens, as in `adaln_modulate`.
        branch: (B, K, D), where row k belongs to token subset[:, k], or (B, N, D) where subset is None. Any of the
            dtypes.
        gate: (B, D).
        subset: as in `adaln_modulate`.

    Returns:
        (B, K, D), or (B, N, D) where subset is None, in x's dtype.

    Raises:
        ValueError: as `adaln_modulate`.
    """
    if not _runs_kernels("gated_residual", {"x": x, "branch": branch, "gate": gate}, subset):
        return naive.gated_residual(x, branch, gate, subset)
    from .launch import residual

    x, branch, gate = map(rows_contiguous, (x, branch, gate))
    return residual(x, branch, gate, _dense_subset(subset))


def gated_residual_adaln(
    x: torch.Tensor,
    branch: torch.Tensor,
    gate: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    subset: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """`y = gated_residual(x, branch, gate, subset)` and `adaln_modulate(y, shift, scale)` in one pass over the rows.

    Args:
        x, branch, gate, shift, scale, subset: as in the two functions.

    Returns:
        (y, modulated), both (B, K, D), or (B, N, D) where subset is None. y has x's dtype; the modulated rows have
        autocast's dtype where autocast is enabled, else x's.

    Raises:
        ValueError: as `adaln_modulate`.
    """
    tensors = {"x": x, "branch": branch, "gate": gate, "shift": shift, "scale": scale}
    if not _runs_kernels("gated_residual_adaln", tensors, subset):
        return naive.gated_residual_adaln(x, branch, gate, shift, scale, subset, _product_dtype(x))
    from .launch import residual_modulate

    x, branch, gate, shift, scale = map(rows_contiguous, (x, branch, gate, shift, scale))
    y, modulated, *_ = residual_modulate(x, branch, gate, shift, scale, _dense_subset(subset), _product_dtype(x))
    return y, modulated


def _runs_kernels(op, tensors, subset):
    """Check the arguments of a call, and return whether it runs the kernels."""
    x = tensors["x"]
    floats = (*FLOATS, torch.float64)
    sizes = {}
    check_tensor(op, "x", x, "BND", sizes, floats)
    if subset is not None:
        check_tensor(op, "subset", subset, "BK", sizes, INDICES, x.device)
        check_subset(op, subset, sizes["N"], distinct=True)
    rows = "BND" if subset is None else "BKD"
    for name, tensor in tensors.items():
        if name != "x":
            check_tensor(op, name, tensor, rows if name == "branch" else "BD", sizes, floats, x.device)
    if not use_triton(x) or sizes["D"] > MAX_WIDTH:
        return False
    check_interpretable(op, **tensors)
    return True


def _product_dtype(x):
    """The dtype of the operand of a matrix product: autocast's where it is enabled, else x's."""
    device = x.device.type
    # The meta device has no autocast. torch 2.11 cannot trace torch.amp.is_autocast_available.
    if x.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return x.dtype


def _dense_subset(subset):
    return None if subset is None else rows_contiguous(subset)
