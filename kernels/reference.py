"""The plain PyTorch twins of the kernels. CPU users train with these, so they are written to be lean, too."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def gather_rows(tokens, subset):
    """Rows `subset` (B, K) of tokens (B, N, C), as a copy (B, K, C).

    One index_select over the flattened rows: `gather` with an expanded index is several times slower on a CPU.
    """
    batch, num_tokens, width = tokens.shape
    if tokens.stride(0) != num_tokens * tokens.stride(1):  # Rows that no flat view can number: index them in place.
        return tokens[torch.arange(batch, device=subset.device).unsqueeze(1), subset]
    first = torch.arange(batch, device=subset.device).unsqueeze(1) * num_tokens
    rows = tokens.reshape(batch * num_tokens, width).index_select(0, (subset + first).reshape(-1))
    return rows.view(batch, subset.shape[1], width)


# ---- Cosine alignment on a subset --------------------------------------------------------------------------------


def _cosine(s, t, s_eps, t_eps):
    """The cosine of rows, 1/|s|, 1/|t|, and the cosine once more, or zero where |s| < eps. Overwrites t."""
    s_norm = torch.linalg.vector_norm(s, dim=-1)
    s_inverse = s_norm.clamp_min(s_eps).reciprocal()
    t_inverse = torch.linalg.vector_norm(t, dim=-1).clamp_min(t_eps).reciprocal()
    cosine = t.mul_(s).sum(-1) * s_inverse * t_inverse  # vecdot would write the product to memory of its own.
    # A norm below eps is a constant eps, as in F.normalize: the part of the gradient along the row vanishes.
    return cosine, s_inverse, t_inverse, torch.where(s_norm < s_eps, 0, cosine)


def _cosine_of_large_rows(s, t, eps):
    """`_cosine` of rows whose squares may overflow: large ones are made smaller first."""
    s_most, t_most = (rows.abs().amax(-1).clamp_min(1) for rows in (s, t))
    s, t = s / s_most.unsqueeze(-1), t / t_most.unsqueeze(-1)
    cosine, s_inverse, t_inverse, along = _cosine(s, t, eps / s_most, eps / t_most)
    return cosine, s_inverse / s_most, t_inverse / t_most, along


class SubsetCosineAlignment(torch.autograd.Function):
    """Keeps the inputs and three scalars per token; no normalised, gathered or widened copy survives the forward."""

    @staticmethod
    def forward(student, teacher, subset, student_is_subset, eps):
        dtype = torch.promote_types(student.dtype, torch.float32)
        if teacher.dtype.is_floating_point:
            dtype = torch.promote_types(dtype, teacher.dtype)
        s = (student if student_is_subset else gather_rows(student, subset)).to(dtype)
        t = gather_rows(teacher, subset).to(dtype)  # A copy, widened or not: it is overwritten.
        if torch.compiler.is_compiling():  # The passes are fused, and the graph cannot branch.
            return _cosine_of_large_rows(s, t, eps)
        result = _cosine(s, t, eps, eps)
        if not bool((result[1] * result[2]).all()):
            # A square above 3.4e38 made a norm infinite: such rows do not occur in a healthy run, so they pay alone.
            result = _cosine_of_large_rows(s, gather_rows(teacher, subset).to(dtype), eps)
        return result

    @staticmethod
    def setup_context(ctx, inputs, output):
        student, teacher, subset, ctx.student_is_subset, _ = inputs
        _, s_inverse, t_inverse, along = output
        ctx.mark_non_differentiable(s_inverse, t_inverse, along)
        ctx.save_for_backward(student, teacher, subset, s_inverse, t_inverse, along)

    @staticmethod
    @once_differentiable  # A second derivative through the saved scalars would silently lack their part.
    def backward(ctx, grad, *_):
        student, teacher, subset, s_inverse, t_inverse, along = ctx.saved_tensors
        s = (student if ctx.student_is_subset else gather_rows(student, subset)).to(s_inverse.dtype)
        grad_s = gather_rows(teacher, subset).to(s_inverse.dtype)  # A copy already: it is overwritten below.
        scale = grad * s_inverse
        if torch.compiler.is_compiling() or bool((s_inverse * torch.minimum(s_inverse, t_inverse) < 1e-30).any()):
            # In an order in which no product of two inverses of large norms vanishes.
            grad_s.mul_(t_inverse.unsqueeze(-1)).addcmul_(s, (s_inverse * along).unsqueeze(-1), value=-1)
            grad_s.mul_(scale.unsqueeze(-1))
        else:
            grad_s.mul_((scale * t_inverse).unsqueeze(-1))
            grad_s.addcmul_(s, (scale * s_inverse * along).unsqueeze(-1), value=-1)
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

    The modulation is constant along the tokens and leaves the first product (see mix_and_drop.py), and the gate goes to
    the hidden layer where it can: the only passes over (B, N, D) are LayerNorm's and the products' own.
    """

    @staticmethod
    def forward(x, shift, scale, gate, w1, b1, w2, b2, subset, product):
        wide = torch.promote_types(product, torch.float32)
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-6)
        hidden = F.gelu(_preactivation(normed, shift, scale, w1, b1, product)[0], approximate="tanh").to(product)
        kept_w2, kept_b2 = _kept(w2, b2, subset, product)
        y = _batched(kept_w2, hidden).to(wide).add_(kept_b2.to(wide).unsqueeze(-1))
        kept = x if subset is None else gather_rows(x, subset)
        out = torch.addcmul(kept, gate.to(wide).unsqueeze(1), y)
        # Not `.to(x.dtype)` where that is no copy: compiled by torch 2.11, such an output's gradient would be zero.
        return out if out.dtype == x.dtype else out.to(x.dtype), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.product = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(*tensors, mean, rstd)

    @staticmethod
    @once_differentiable  # A second derivative through the saved scalars would silently lack their part.
    def backward(ctx, dout, *_):
        x, shift, scale, gate, w1, b1, w2, b2, subset, mean, rstd = ctx.saved_tensors
        product = ctx.product
        wide = torch.promote_types(product, torch.float32)
        gates = gate.to(wide).unsqueeze(1)
        dy = dout.to(product)

        normed = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-6)[0].to(product)
        a, z, w1_sum = _preactivation(normed, shift, scale, w1, b1, product)
        hidden = F.gelu(a, approximate="tanh")
        kept_w2, kept_b2 = _kept(w2, b2, subset, product)
        q = _batched(kept_w2.mT, dy).to(wide)
        dgate = torch.linalg.vecdot(hidden, q, dim=1) + _batched(kept_b2.to(product).unsqueeze(-2), dy).squeeze(1)
        dw2 = _add_rows(torch.bmm(dy, hidden.mul_(gates).to(product).mT).to(wide), subset, w2)
        db2 = _add_rows(torch.bmm(dy, gate.to(product).unsqueeze(-1)).to(wide), subset, b2.unsqueeze(-1)).squeeze(-1)

        da = torch.ops.aten.gelu_backward(q.mul_(gates), a, approximate="tanh")
        dshift = _batched(w1_sum.unsqueeze(0), da).squeeze(1)
        dscale = torch.linalg.vecdot(da, z, dim=1)
        db1 = da.sum((0, 2))
        dw1 = torch.bmm(da, shift.to(wide).unsqueeze(-1)).sum(0)
        ds = da.mul_((1 + scale.to(wide)).unsqueeze(1)).to(product)
        dw1 = torch.bmm(ds, normed.mT).to(wide).sum(0).add_(dw1)
        dnormed = _batched(w1.to(product).T, ds).to(x.dtype)
        dx = torch.ops.aten.native_layer_norm_backward(
            dnormed, x, x.shape[-1:], mean, rstd, None, None, (True, False, False)
        )[0]
        if subset is None:
            dx += dout
        else:
            rows, flat = _flat_rows(subset, x.shape[1]), dx.view(-1, x.shape[-1])
            flat.index_copy_(0, rows, flat.index_select(0, rows).add_(dout.reshape(-1, x.shape[-1])))
        small = ((dshift, shift), (dscale, scale), (dgate, gate), (dw1, w1), (db1, b1), (dw2, w2), (db2, b2))
        return dx, *(grad.to(tensor.dtype) for grad, tensor in small), None, None


def _batched(a, b):
    """a @ b, where a (M, N) or (B, M, N) and b (B, N, D): always the batched kernel, which copies neither."""
    return torch.bmm(a.expand(b.shape[0], *a.shape[-2:]), b)


def _preactivation(normed, shift, scale, w1, b1, product):
    """A and Z = w1 @ normed, both (B, T, D), and the row sums of w1 (T,); in float32 at least."""
    wide = torch.promote_types(product, torch.float32)
    w1 = w1.to(product)
    w1_sum = w1.sum(1, dtype=wide)
    z = _batched(w1, normed.to(product)).to(wide)
    a = torch.addcmul(b1.to(wide).unsqueeze(-1), w1_sum.unsqueeze(-1), shift.to(wide).unsqueeze(1))
    return a.addcmul_(z, (1 + scale.to(wide)).unsqueeze(1)), z, w1_sum


def _kept(w2, b2, subset, product):
    """Rows `subset` of w2, (B, K, T), and of b2, (B, K); as they are where subset is None."""
    w2 = w2.to(product)
    if subset is None:
        return w2, b2
    index = subset.reshape(-1)
    return w2.index_select(0, index).view(*subset.shape, w2.shape[1]), b2.index_select(0, index).view(subset.shape)


def _flat_rows(subset, num_tokens):
    """The kept rows' places in (B * N) rows."""
    return (subset + torch.arange(subset.shape[0], device=subset.device).unsqueeze(1) * num_tokens).reshape(-1)


def _add_rows(rows, subset, like):
    """Sum over the images of rows (B, K, C) at their places in a tensor shaped as `like` (N, C).

    By placing and summing: the indices of an image are distinct, and index_add_ is slow on a CPU.
    """
    if subset is not None:
        grid = rows.new_zeros((rows.shape[0] * like.shape[0], rows.shape[-1]))
        rows = grid.index_copy_(0, _flat_rows(subset, like.shape[0]), rows.flatten(0, 1)).view(-1, *like.shape)
    return rows.sum(0)


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None, product=None):
    """Reference of `mix_and_drop`: (B, K, D), or (B, N, D) where subset is None; products in dtype `product`."""
    return MixAndDrop.apply(x, shift, scale, gate, w1, b1, w2, b2, subset, product or x.dtype)[0]
