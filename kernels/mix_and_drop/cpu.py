"""The CPU path of mix_and_drop: the same result as naive.py, with fewer passes over memory.

Training on a CPU uses this code. A GPU also uses it where the hidden layer is too wide for the kernels.
"""

import torch
import torch.nn.functional as F

from ..rows import flat_rows, gather_rows
from ..transforms import applying, first_gradient


class MixAndDrop(torch.autograd.Function):
    """Saves its inputs and two scalars per token; the backward recomputes the normalization and the first product.

    The modulation is constant along the tokens, so it is applied after the first product (see kernels.py), and the gate
    is applied to the hidden layer where possible. The only passes over (B, N, D) are those of LayerNorm and of the
    products.
    """

    @staticmethod
    def forward(x, shift, scale, gate, w1, b1, w2, b2, subset, product_dtype):
        wide = torch.promote_types(product_dtype, torch.float32)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-6)
        a = _preactivation(normed, shift, scale, w1, b1, product_dtype)[0]
        hidden = F.gelu(a, approximate="tanh").to(product_dtype)
        kept_w2, kept_b2 = _kept(w2, b2, subset, product_dtype)
        y = _batched(kept_w2, hidden).to(wide).add_(kept_b2.to(wide).unsqueeze(-1))
        kept = x if subset is None else gather_rows(x, subset)
        out = torch.addcmul(kept, gate.to(wide).unsqueeze(1), y)
        # `.to(x.dtype)` is skipped where it is not a copy: under torch.compile (2.11) the gradient would be zero.
        return out if out.dtype == x.dtype else out.to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.product_dtype = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx, dout, *_):
        return *_first_gradients(dout, *ctx.saved_tensors, ctx.product_dtype), None, None


def _gradients(dout, x, shift, scale, gate, w1, b1, w2, b2, subset, mean, rstd, product_dtype):
    """Gradients of the eight tensors."""
    wide = torch.promote_types(product_dtype, torch.float32)
    gates = gate.to(wide).unsqueeze(1)
    dy = dout.to(product_dtype)

    normed = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-6)[0].to(product_dtype)
    a, z, w1_sum = _preactivation(normed, shift, scale, w1, b1, product_dtype)
    hidden = F.gelu(a, approximate="tanh")
    kept_w2, kept_b2 = _kept(w2, b2, subset, product_dtype)
    q = _batched(kept_w2.mT, dy).to(wide)
    dgate = torch.linalg.vecdot(hidden, q, dim=1) + _batched(kept_b2.to(product_dtype).unsqueeze(-2), dy).squeeze(1)
    dw2 = _add_rows(torch.bmm(dy, hidden.mul_(gates).to(product_dtype).mT).to(wide), subset, w2)
    gated = torch.bmm(dy, gate.to(product_dtype).unsqueeze(-1)).to(wide)
    db2 = _add_rows(gated, subset, b2.unsqueeze(-1)).squeeze(-1)

    da = torch.ops.aten.gelu_backward(q.mul_(gates), a, approximate="tanh")
    dshift = _batched(w1_sum.unsqueeze(0), da).squeeze(1)
    dscale = torch.linalg.vecdot(da, z, dim=1)
    db1 = da.sum((0, 2))
    dw1 = torch.bmm(da, shift.to(wide).unsqueeze(-1)).sum(0)
    ds = da.mul_((1 + scale.to(wide)).unsqueeze(1)).to(product_dtype)
    dw1 = torch.bmm(ds, normed.mT).to(wide).sum(0).add_(dw1)
    dnormed = _batched(w1.to(product_dtype).T, ds).to(x.dtype)
    dx = torch.ops.aten.native_layer_norm_backward(
        dnormed, x, x.shape[-1:], mean, rstd, None, None, (True, False, False)
    )[0]
    if subset is None:
        dx += dout
    else:
        rows, flat = flat_rows(subset, x.shape[1]), dx.view(-1, x.shape[-1])
        flat.index_copy_(0, rows, flat.index_select(0, rows).add_(dout.reshape(-1, x.shape[-1])))
    small = ((dshift, shift), (dscale, scale), (dgate, gate), (dw1, w1), (db1, b1), (dw2, w2), (db2, b2))
    return dx, *(grad.to(tensor.dtype) for grad, tensor in small)


_apply = applying("mix_and_drop", MixAndDrop)
# A second derivative would silently omit the terms through the saved scalars, so it raises an error.
_first_gradients = first_gradient("mix_and_drop", _gradients)


def _batched(a, b):
    """a @ b for a (M, N) or (B, M, N) and b (B, N, D), always by the batched kernel, which copies neither operand."""
    return torch.bmm(a.expand(b.shape[0], *a.shape[-2:]), b)


def _preactivation(normed, shift, scale, w1, b1, product_dtype):
    """A and Z = w1 @ normed, both (B, T, D), and the row sums of w1 (T,), in float32 or a wider dtype."""
    wide = torch.promote_types(product_dtype, torch.float32)
    w1 = w1.to(product_dtype)
    w1_sum = w1.sum(1, dtype=wide)
    z = _batched(w1, normed.to(product_dtype)).to(wide)
    a = torch.addcmul(b1.to(wide).unsqueeze(-1), w1_sum.unsqueeze(-1), shift.to(wide).unsqueeze(1))
    return a.addcmul_(z, (1 + scale.to(wide)).unsqueeze(1)), z, w1_sum


def _kept(w2, b2, subset, product_dtype):
    """Rows `subset` of w2, (B, K, T), and of b2, (B, K). Without a subset, w2 (N, T) and b2 (N,) themselves."""
    w2 = w2.to(product_dtype)
    if subset is None:
        return w2, b2
    index = subset.reshape(-1)
    return w2.index_select(0, index).view(*subset.shape, w2.shape[1]), b2.index_select(0, index).view(subset.shape)


def _add_rows(rows, subset, like):
    """Add rows (B, K, C) to zeros of the shape of `like` (N, C), at the indices `subset`, summed over the images.

    This copies rows to their indices and sums over the images: the indices of an image are distinct, and index_add_ is
    slow on a CPU.
    """
    if subset is not None:
        grid = rows.new_zeros((rows.shape[0] * like.shape[0], rows.shape[-1]))
        rows = grid.index_copy_(0, flat_rows(subset, like.shape[0]), rows.flatten(0, 1)).view(-1, *like.shape)
    return rows.sum(0)


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None, product_dtype=None):
    """Arguments as in operations.py; matrix products run in `product_dtype` (x's where it is None).

    Returns (B, K, D), or (B, N, D) where subset is None, in x's dtype.
    """
    return _apply(x, shift, scale, gate, w1, b1, w2, b2, subset, product_dtype or x.dtype)[0]
