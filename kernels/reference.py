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


def mix_and_drop(x, shift, scale, gate, w1, b1, w2, b2, subset=None):
    """Reference of `mix_and_drop`: (B, K, D), or (B, N, D) where subset is None."""
    u = F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)
    hidden = F.gelu(w1 @ u + b1.unsqueeze(-1), approximate="tanh")
    if subset is None:
        return x + gate.unsqueeze(1) * (w2 @ hidden + b2.unsqueeze(-1)).to(x.dtype)
    index = subset.reshape(-1)
    kept_w2 = w2.index_select(0, index).view(*subset.shape, -1)
    kept_b2 = b2.index_select(0, index).view(*subset.shape, 1)
    return gather_rows(x, subset) + gate.unsqueeze(1) * (kept_w2 @ hidden + kept_b2).to(x.dtype)
