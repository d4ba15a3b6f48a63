"""Cosine similarity of student and teacher tokens on a subset of the tokens, and the alignment loss.

    cosine[b, k] = s . t / (max(|s|, eps) max(|t|, eps)),   s = student row, t = teacher[b, subset[b, k]]

REPA's alignment loss (arXiv 2410.06940, eq. 8) is the negative mean of this; MaskAlign computes it on the tokens that
it keeps. The forward reads both rows once, the teacher's directly from its full grid, and saves three scalars per
token: 1/|s|, 1/|t| and the cosine. With them the backward is one elementwise pass over the two rows:

    d loss / d s = g / |s| * (t / |t| - cosine * s / |s|),   without the second term where |s| < eps
"""

import triton
import triton.language as tl


@triton.jit
def _products(
    s_rows, t_rows, live, s_scale, t_scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """The sums of s*t, s*s and t*t for each of ROWS rows.

    Each lane accumulates its own columns, so there is one reduction across lanes, at the end of the row.
    """
    dot = tl.zeros([ROWS, BLOCK_C], tl.float32)
    ss = tl.zeros([ROWS, BLOCK_C], tl.float32)
    tt = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in tl.static_range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        mask = live[:, None] & (cols < C)[None, :]
        s = tl.load(s_rows[:, None] + cols[None, :], mask=mask, other=0).to(tl.float32)
        t = tl.load(t_rows[:, None] + cols[None, :], mask=mask, other=0).to(tl.float32)
        if SCALED:
            s = s * s_scale[:, None]
            t = t * t_scale[:, None]
        dot += s * t
        ss += s * s
        tt += t * t
    return tl.sum(dot, 1), tl.sum(ss, 1), tl.sum(tt, 1)


@triton.jit
def forward_kernel(
    student_ptr, teacher_ptr, subset_ptr, weight_ptr, cosine_ptr, saved_ptr,
    kept, saved_plane, student_batch, student_row, teacher_batch, teacher_row, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    GATHER: tl.constexpr, WIDE: tl.constexpr, LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one image per program; grid (images * ceil(kept / ROWS),).

    cosine_ptr receives one float per token. With LOSS it receives one sum per program, the first stage of the mean.
    """
    groups = tl.cdiv(kept, ROWS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    k = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)
    live = k < kept
    token = image * kept + k
    n = tl.load(subset_ptr + token, mask=live, other=0).to(tl.int64)
    t_rows = teacher_ptr + image * teacher_batch + n * teacher_row
    s_rows = student_ptr + image * student_batch + (n if GATHER else k.to(tl.int64)) * student_row

    one = tl.full([ROWS], 1.0, tl.float32)
    dot, ss, tt = _products(s_rows, t_rows, live, one, one, C, BLOCK_C, ROWS, False)
    s_scale = one
    t_scale = one
    if WIDE:
        # Squares of bfloat16 and float32 values overflow from 1.8e19 on. Only such rows, which a normal run does not
        # have, are read again (from L2) and scaled by a power of two, with which the square of the largest float is
        # finite.
        s_scale = tl.where(ss == float("inf"), 8.271806125530277e-25, 1.0)
        t_scale = tl.where(tt == float("inf"), 8.271806125530277e-25, 1.0)
        if tl.min(tl.minimum(s_scale, t_scale), 0) < 1.0:
            dot, ss, tt = _products(s_rows, t_rows, live, s_scale, t_scale, C, BLOCK_C, ROWS, True)

    s_norm = tl.sqrt(ss)
    s_inverse = 1.0 / tl.maximum(s_norm, eps * s_scale)
    t_inverse = 1.0 / tl.maximum(tl.sqrt(tt), eps * t_scale)
    cosine = dot * s_inverse * t_inverse
    along = tl.where(s_norm < eps * s_scale, 0.0, cosine)  # As in F.normalize: max(|s|, eps) is flat below eps.
    tl.store(saved_ptr + token, s_inverse * s_scale, mask=live)
    tl.store(saved_ptr + saved_plane + token, t_inverse * t_scale, mask=live)
    tl.store(saved_ptr + 2 * saved_plane + token, along, mask=live)
    if LOSS:
        if WEIGHTED:
            cosine *= tl.load(weight_ptr + image).to(tl.float32)
        tl.store(cosine_ptr + tl.program_id(0), tl.sum(tl.where(live, cosine, 0.0), 0))
    else:
        tl.store(cosine_ptr + token, cosine, mask=live)


@triton.jit
def mean_kernel(partial_ptr, loss_ptr, programs, count, scale, BLOCK: tl.constexpr):
    """The second stage of the loss: one program adds the partial sums in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offsets, mask=offsets < programs, other=0.0)
    tl.store(loss_ptr, -scale * (tl.sum(total, 0) / count))


@triton.jit
def _gradient_rows(
    student_ptr, teacher_ptr, out_ptr, s_rows, t_rows, out_rows, read, write, factor, along_s, along_t,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = factor * (along_t * t - along_s * s), row by row; rows that are written but not read become zero.

    The difference is of order 1 for rows of any length, so no intermediate product overflows or underflows.
    """
    for start in tl.static_range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        inside = (cols < C)[None, :]
        s = tl.load(student_ptr + (s_rows[:, None] + cols[None, :]), mask=read[:, None] & inside, other=0)
        t = tl.load(teacher_ptr + (t_rows[:, None] + cols[None, :]), mask=read[:, None] & inside, other=0)
        out = along_t[:, None] * t.to(tl.float32) - along_s[:, None] * s.to(tl.float32)
        out = out * factor[:, None]
        tl.store(
            out_ptr + (out_rows[:, None] + cols[None, :]), out.to(out_ptr.dtype.element_ty),
            mask=write[:, None] & inside,
        )  # fmt: skip


@triton.jit
def backward_kernel(
    grad_ptr, weight_ptr, student_ptr, teacher_ptr, subset_ptr, saved_ptr, out_ptr,
    kept, saved_plane, grad_batch, grad_token, count, scale,
    student_batch, student_row, teacher_batch, teacher_row,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The gradient of student rows (B, K, C), where row k belongs to token subset[:, k]; grid as in the forward."""
    groups = tl.cdiv(kept, ROWS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    k = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)
    live = k < kept
    token = image * kept + k
    n = tl.load(subset_ptr + token, mask=live, other=0).to(tl.int64)
    s_inverse = tl.load(saved_ptr + token, mask=live, other=0.0)
    t_inverse = tl.load(saved_ptr + saved_plane + token, mask=live, other=0.0)
    along = tl.load(saved_ptr + 2 * saved_plane + token, mask=live, other=0.0)
    if LOSS:
        grad = tl.load(grad_ptr) * (-scale / count)
        if WEIGHTED:
            grad *= tl.load(weight_ptr + image).to(tl.float32)
    else:
        grad = tl.load(grad_ptr + image * grad_batch + k.to(tl.int64) * grad_token, mask=live, other=0.0)
    _gradient_rows(
        student_ptr,
        teacher_ptr,
        out_ptr,
        image * student_batch + k.to(tl.int64) * student_row,
        image * teacher_batch + n * teacher_row,
        token * C,
        live,
        live,
        grad * s_inverse,
        along * s_inverse,
        t_inverse,
        C,
        BLOCK_C,
    )


@triton.jit
def backward_gather_kernel(
    grad_ptr, weight_ptr, student_ptr, teacher_ptr, subset_ptr, saved_ptr, out_ptr,
    tokens, kept, saved_plane, grad_batch, grad_token, count, scale,
    student_batch, student_row, teacher_batch, teacher_row,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """The gradient of student rows (B, N, C) that are gathered: rows outside the subset are set to zero.

    A program owns ROWS consecutive tokens and searches for them in the image's subset, which need not be sorted. The
    comparisons are fewer than the elements of the rows. The gradients of a repeated index are added up. This needs no
    atomics, no memset and no inverse table.
    """
    groups = tl.cdiv(tokens, ROWS)
    image = (tl.program_id(0) // groups).to(tl.int64)
    n = (tl.program_id(0) % groups) * ROWS + tl.arange(0, ROWS)
    inside = n < tokens
    at = tl.full([ROWS], -1, tl.int32)
    grad = tl.zeros([ROWS], tl.float32)
    for start in range(0, kept, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        index = tl.load(subset_ptr + image * kept + k, mask=k < kept, other=-1).to(tl.int32)
        match = index[None, :] == n[:, None]
        at = tl.maximum(at, tl.max(tl.where(match, k[None, :], -1), 1))
        if LOSS:
            grad += tl.sum(tl.where(match, 1.0, 0.0), 1)
        else:
            here = tl.load(grad_ptr + image * grad_batch + k.to(tl.int64) * grad_token, mask=k < kept, other=0.0)
            grad += tl.sum(tl.where(match, here[None, :], 0.0), 1)
    if LOSS:
        grad *= tl.load(grad_ptr) * (-scale / count)
        if WEIGHTED:
            grad *= tl.load(weight_ptr + image).to(tl.float32)
    found = inside & (at >= 0)
    token = image * kept + at
    s_inverse = tl.load(saved_ptr + token, mask=found, other=0.0)
    t_inverse = tl.load(saved_ptr + saved_plane + token, mask=found, other=0.0)
    along = tl.load(saved_ptr + 2 * saved_plane + token, mask=found, other=0.0)
    row = n.to(tl.int64)
    _gradient_rows(
        student_ptr, teacher_ptr, out_ptr,
        image * student_batch + row * student_row, image * teacher_batch + row * teacher_row,
        (image * tokens + row) * C, found, inside, grad * s_inverse, along * s_inverse, t_inverse, C, BLOCK_C,
    )  # fmt: skip
