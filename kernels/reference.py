"""The plain PyTorch twins of the kernels. CPU users train with these, so they are written to be lean, too."""

import torch
import torch.nn.functional as F


def gather_rows(tokens, subset):
    """Rows `subset` (B, K) of tokens (B, N, C), as a copy (B, K, C).

    One index_select over the flattened rows: `gather` with an expanded index is several times slower on a CPU.
    """
    batch, num_tokens, width = tokens.shape
    first = torch.arange(batch, device=subset.device).unsqueeze(1) * num_tokens
    rows = tokens.reshape(batch * num_tokens, width).index_select(0, (subset + first).reshape(-1))
    return rows.view(batch, subset.shape[1], width)


# ---- Cosine alignment on a subset --------------------------------------------------------------------------------


class SubsetCosineAlignment(torch.autograd.Function):
    """Keeps the inputs and three scalars per token; no normalised, gathered or widened copy survives the forward."""

    @staticmethod
    def forward(student, teacher, subset, student_is_subset, eps):
        dtype = torch.promote_types(student.dtype, torch.float32)
        if teacher.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, teacher.dtype)
        s = (student if student_is_subset else gather_rows(student, subset)).to(dtype)
        t = gather_rows(teacher, subset).to(dtype)
        s_norm = torch.linalg.vector_norm(s, dim=-1)
        s_inverse = s_norm.clamp_min(eps).reciprocal()
        t_inverse = torch.linalg.vector_norm(t, dim=-1).clamp_min(eps).reciprocal()
        cosine = torch.linalg.vecdot(s, t) * s_inverse * t_inverse
        # A norm below eps is a constant eps, as in F.normalize: the part of the gradient along the row vanishes.
        along = torch.where(s_norm < eps, 0, cosine)
        return cosine, s_inverse, t_inverse, along

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, subset, ctx.student_is_subset, _ = inputs
        _, s_inverse, t_inverse, along = output
        ctx.mark_non_differentiable(s_inverse, t_inverse, along)
        ctx.save_for_backward(student, teacher, subset, s_inverse, t_inverse, along)

    @staticmethod
    def backward(ctx, grad, *_):
        student, teacher, subset, s_inverse, t_inverse, along = ctx.saved_tensors
        s = (student if ctx.student_is_subset else gather_rows(student, subset)).to(s_inverse.dtype)
        grad_s = gather_rows(teacher, subset).to(s_inverse.dtype)  # A copy already: it is overwritten below.
        scale = grad * s_inverse
        grad_s.mul_((scale * t_inverse).unsqueeze(-1)).addcmul_(s, (scale * s_inverse * along).unsqueeze(-1), value=-1)
        grad_s = grad_s.to(student.dtype)
        if not ctx.student_is_subset:
            index = subset.long().unsqueeze(-1).expand_as(grad_s)
            grad_s = torch.zeros_like(student).scatter_add_(1, index, grad_s)
        return grad_s, None, None, None, None


def subset_cosine_alignment(student, teacher, subset, student_is_subset=True, eps=1e-12):
    """Reference of `subset_cosine_alignment`, float32 (B, K); float64 where student or teacher is."""
    return SubsetCosineAlignment.apply(student, teacher, subset, student_is_subset, eps)[0]


# ---- Mix and drop ------------------------------------------------------------------------------------------------


class MixAndDrop(torch.autograd.Function):
    """Keeps its inputs and two scalars per token; the backward normalises and multiplies again.

    The modulation is constant along the tokens and leaves the first product (see mix_and_drop.py), so all that is of
    size (B, N, D) is the normalised x, for as long as its product takes.
    """

    @staticmethod
    def forward(x, shift, scale, gate, w1, b1, w2, b2, subset, product):
        wide = torch.promote_types(product, torch.float32)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-6)
        hidden = F.gelu(_preactivation(normed, shift, scale, w1, b1, product)[0], approximate="tanh").to(product)
        kept_w2, kept_b2 = (w2.to(product), b2) if subset is None else (_rows(w2.to(product), subset), _rows(b2, subset))
        y = _batched(kept_w2, hidden).to(wide) + kept_b2.to(wide).unsqueeze(-1)
        out = (x if subset is None else gather_rows(x, subset)) + gate.to(wide).unsqueeze(1) * y
        return out.to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.product = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    def backward(ctx, dout, *_):
        x, shift, scale, gate, w1, b1, w2, b2, subset, mean, rstd = ctx.saved_tensors
        product = ctx.product
        wide = torch.promote_types(product, torch.float32)
        batch, num_tokens, width = x.shape
        normed = torch.native_layer_norm(x, (width,), None, None, 1e-6)[0]
        a, z, w1_sum = _preactivation(normed, shift, scale, w1, b1, product)
        hidden = F.gelu(a, approximate="tanh")
        kept_w2, kept_b2 = (w2.to(product), b2) if subset is None else (_rows(w2.to(product), subset), _rows(b2, subset))
        q = _batched(kept_w2.mT, dout.to(product)).to(wide)
        kept_b2 = kept_b2.to(wide).expand(dout.shape[:2]).unsqueeze(1)
        dgate = torch.linalg.vecdot(hidden, q, dim=1) + (kept_b2 @ dout.to(wide)).squeeze(1)
        da = torch.ops.aten.gelu_backward(q * gate.to(wide).unsqueeze(1), a, approximate="tanh")
        dshift = (w1_sum @ da).to(shift.dtype)
        dscale = torch.linalg.vecdot(da, z, dim=1).to(scale.dtype)
        shifted = torch.bmm(da, shift.to(wide).unsqueeze(-1)).sum(0)
        db1 = da.sum((0, 2)).to(b1.dtype)
        grad_z = (da * (1 + scale.to(wide)).unsqueeze(1)).to(product)
        # Batch and width are one long contracted dimension: one product, no per-image weight gradients.
        dw1 = torch.bmm(grad_z, normed.to(product).mT).to(wide).sum(0) + shifted
        gated = dout * gate.unsqueeze(1).to(dout.dtype)
        per_row = torch.bmm(gated.to(product), hidden.to(product).mT).to(wide)
        db2_rows = gated.sum(-1, dtype=wide)
        if subset is None:
            dw2, db2 = per_row.sum(0), db2_rows.sum(0)
        else:
            index = subset.reshape(-1)
            dw2 = per_row.new_zeros(w2.shape).index_add_(0, index, per_row.flatten(0, 1))
            db2 = db2_rows.new_zeros(b2.shape).index_add_(0, index, db2_rows.reshape(-1))
        dnormed = _batched(w1.to(product).T, grad_z).to(x.dtype)
        dx = torch.ops.aten.native_layer_norm_backward(
            dnormed, x, (width,), mean, rstd, None, None, (True, False, False)
        )[0]
        if subset is None:
            dx += dout
        else:
            first = torch.arange(batch, device=x.device).unsqueeze(1) * num_tokens
            dx.view(-1, width).index_add_(0, (subset + first).reshape(-1), dout.reshape(-1, width))
        return (
            dx, dshift, dscale, dgate.to(gate.dtype), dw1.to(w1.dtype), db1, dw2.to(w2.dtype), db2.to(b2.dtype), None, None
        )


def _rows(weight, subset):
    """weight[subset] for a vector or a matrix, with the batch in front."""
    return weight.index_select(0, subset.reshape(-1)).view(*subset.shape, *weight.shape[1:])


def _batched(a, b):
    """a @ b, where a (M, N) or (B, M, N) and b (B, N, D): always the batched kernel, which copies neither."""
    return torch.bmm(a.expand(b.shape[0], *a.shape[-2:]), b)


def _preactivation(normed, shift, scale, w1, b1, product):
    """A (B, T, D), Z = w1 @ normed, and the row sums of w1 (T,), the last two in float32 at least."""
    wide = torch.promote_types(product, torch.float32)
    w1 = w1.to(product)
    w1_sum = w1.sum(1, dtype=wide)
    z = _batched(w1, normed.to(product)).to(wide)
    a = z * (1 + scale.to(wide)).unsqueeze(1)
    a += w1_sum.unsqueeze(-1) * shift.to(wide).unsqueeze(1) + b1.to(wide).unsqueeze(-1)
    return a, z, w1_sum


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None, product=None):
    """Reference of `mix_and_drop`: (B, K, D), or (B, N, D) where subset is None; products in dtype `product`."""
    return MixAndDrop.apply(x, shift, scale, gate, w1, b1, w2, b2, subset, product or x.dtype)[0]
