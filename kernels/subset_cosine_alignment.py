"""Cosine similarity of student tokens with teacher tokens on a subset of the tokens, and the loss made of it.

    cosine[b, k] = s . t / (max(|s|, eps) max(|t|, eps)),   s = student row, t = teacher[b, subset[b, k]]

This is REPA's alignment (arXiv 2410.06940, eq. 8: the negative mean of this is the loss) on the tokens that
MaskAlign keeps. The forward reads both rows once, straight from the teacher's full grid, and keeps three
scalars per token: 1/|s|, 1/|t| and the cosine. With them the backward is one more pass over the two rows,
element by element:

    d loss / d s = g / |s| * (t / |t| - cosine * s / |s|),   without the second term where |s| < eps
"""

import torch

from . import reference
from .runtime import (
    FLOATS,
    INDICES,
    WARP_SIZE,
    check_interpretable,
    check_subset,
    check_tensor,
    fail,
    jit,
    kernel_op,
    rows_contiguous,
    tl,
    use_triton,
    wrap_triton,
)
from .tuning import choose

OP = "subset_cosine_alignment"

# ---- Kernels -----------------------------------------------------------------------------------------------


@jit
def _products(
    s_rows, t_rows, live, s_scale, t_scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Sums s*t, s*s and t*t of ROWS rows. The partial sums of a row stay apart until its end: one reduction
    per row.
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


@jit
def _forward_kernel(
    student_ptr, teacher_ptr, subset_ptr, weight_ptr, cosine_ptr, saved_ptr,
    kept, saved_plane, student_batch, student_row, teacher_batch, teacher_row, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    GATHER: tl.constexpr, WIDE: tl.constexpr, LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one image per program; grid (images * ceil(kept / ROWS),).

    cosine_ptr receives one float per token, or with LOSS one sum per program, the first stage of the mean.
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
        # Squares of bfloat16 and float32 overflow from 1.8e19 on. Such rows do not occur in a healthy run, so
        # they pay alone: read again (from L2) with a power of two in front, which brings the largest float
        # back in range.
        s_scale = tl.where(ss == float("inf"), 8.271806125530277e-25, 1.0)
        t_scale = tl.where(tt == float("inf"), 8.271806125530277e-25, 1.0)
        if tl.min(tl.minimum(s_scale, t_scale), 0) < 1.0:
            dot, ss, tt = _products(s_rows, t_rows, live, s_scale, t_scale, C, BLOCK_C, ROWS, True)

    s_norm = tl.sqrt(ss)
    s_inverse = 1.0 / tl.maximum(s_norm, eps * s_scale)
    t_inverse = 1.0 / tl.maximum(tl.sqrt(tt), eps * t_scale)
    cosine = dot * s_inverse * t_inverse
    along = tl.where(
        s_norm < eps * s_scale, 0.0, cosine
    )  # As in F.normalize: max(|s|, eps) is flat below eps.
    tl.store(saved_ptr + token, s_inverse * s_scale, mask=live)
    tl.store(saved_ptr + saved_plane + token, t_inverse * t_scale, mask=live)
    tl.store(saved_ptr + 2 * saved_plane + token, along, mask=live)
    if LOSS:
        if WEIGHTED:
            cosine *= tl.load(weight_ptr + image).to(tl.float32)
        tl.store(cosine_ptr + tl.program_id(0), tl.sum(tl.where(live, cosine, 0.0), 0))
    else:
        tl.store(cosine_ptr + token, cosine, mask=live)


@jit
def _mean_kernel(partial_ptr, loss_ptr, programs, count, scale, BLOCK: tl.constexpr):
    """The second stage of the loss: one program adds the partial sums in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, programs, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + offsets, mask=offsets < programs, other=0.0)
    tl.store(loss_ptr, -scale * (tl.sum(total, 0) / count))


@jit
def _gradient_rows(
    student_ptr, teacher_ptr, out_ptr, s_rows, t_rows, out_rows, read, write, factor, along_s, along_t,
    C: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out = factor * (along_t * t - along_s * s), row by row; rows that are written but not read become zero.

    The difference is of order one however long the rows are, so no product leaves the range of float32 before
    its time.
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


@jit
def _backward_kernel(
    grad_ptr, weight_ptr, student_ptr, teacher_ptr, subset_ptr, saved_ptr, out_ptr,
    kept, saved_plane, grad_batch, grad_token, count, scale,
    student_batch, student_row, teacher_batch, teacher_row,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Student rows go with the subset row for row; grid as in the forward."""
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


@jit
def _backward_gather_kernel(
    grad_ptr, weight_ptr, student_ptr, teacher_ptr, subset_ptr, saved_ptr, out_ptr,
    tokens, kept, saved_plane, grad_batch, grad_token, count, scale,
    student_batch, student_row, teacher_batch, teacher_row,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
    LOSS: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Student rows are gathered: all rows of the grid are written, zeros where the subset has no such token.

    A program owns ROWS consecutive tokens and looks for them in the image's subset, which need not be sorted:
    comparing costs fewer operations than the rows have elements. Were an index there twice, its gradients
    would add up, as they should; no atomics, no memset, no inverse table.
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
            here = tl.load(
                grad_ptr + image * grad_batch + k.to(tl.int64) * grad_token, mask=k < kept, other=0.0
            )
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


# ---- Launchers ---------------------------------------------------------------------------------------------


def configurations(width, itemsize, gather_backward=False):
    """The configurations of the row kernels; the first is the default.

    Args:
        width: C.
        itemsize: bytes of an element of the narrower of student and teacher.
        gather_backward: for the kernel that looks its tokens up in the subset.

    A row is read in steps of BLOCK_C columns, at most what one warp takes with 16 bytes per lane (so that its
    sums stay inside the warp) unless there would be more than eight steps, and less where that leaves fewer
    lanes idle at the end of the row (C = 320 goes as 5 x 64). ROWS gives every thread at least one 16-byte
    load per step even of the narrower dtype. The alternatives keep two such loads per step in flight in half
    as many programs, or double the program, rows and threads. (Half as many threads, and a doubled gathering
    program, spill a few registers on sm_80 and sm_90.) The gathering backward takes 16 rows unless they are
    long, so that the look-up, which every program repeats, stays a few per cent of the rows' bytes.
    """
    threads = 256 if gather_backward or width > 4096 else 128
    per_thread = 16 // itemsize
    widest = max(32 * per_thread, 1 << max(0, (-(-width // 8) - 1).bit_length()))
    halves = (widest >> i for i in range(5))
    blocks = [block for block in halves if block >= 64 and -(-width // block) <= 8] or [widest]
    waste = {block: -(-width // block) * block for block in blocks}
    block = next((b for b in blocks if waste[b] <= 1.15 * width), min(blocks, key=waste.get))
    block = max(16, min(block, 1 << (width - 1).bit_length()))
    rows = max(min(16, 4096 // block) if gather_backward else 1, threads * per_thread // block)
    configs = [
        {"ROWS": rows, "BLOCK_C": block, "threads": threads},
        {"ROWS": 2 * rows, "BLOCK_C": block, "threads": threads},
        {"ROWS": 2 * rows, "BLOCK_C": block, "threads": 2 * threads},
    ]
    return configs[:2] if gather_backward else configs


def look_up_block(config):
    """Subset entries compared at a time: at most 4096 comparisons per step, which stay in registers."""
    return max(16, min(128, 4096 // config["ROWS"]))


def _options(config, warp=WARP_SIZE):
    """A configuration as the keyword arguments of a launch."""
    blocks = {"ROWS": config["ROWS"], "BLOCK_C": config["BLOCK_C"]}
    return {**blocks, "num_warps": config["threads"] // warp, "num_stages": 1}


def _key(student, teacher, *flags):
    return (int(student.shape[-1]), str(student.dtype), str(teacher.dtype), *flags)


def _itemsize(student, teacher):
    return min(student.dtype.itemsize, teacher.dtype.itemsize)


def may_overflow(*dtypes):
    """Whether squares of these dtypes can overflow float32."""
    return any(dtype in (torch.bfloat16, torch.float32) for dtype in dtypes)


def _forward(student, teacher, subset, weight, student_is_subset, eps, loss):
    """Launch the forward; returns the cosines (B, K), or each program's sum, and the saved scalars."""
    subset = subset.contiguous()  # Small, and nearly always so already.
    batch, kept = subset.shape
    width = int(student.shape[-1])
    saved = torch.empty((3, batch, kept), dtype=torch.float32, device=student.device)
    configs = configurations(width, _itemsize(student, teacher))

    def outputs(config):
        shape = (batch * -(-kept // config["ROWS"]),) if loss else (batch, kept)
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    def launch(config, out):
        wrap_triton(_forward_kernel)[(batch * -(-kept // config["ROWS"]),)](
            student, teacher, subset, subset if weight is None else weight, out, saved, kept, batch * kept,
            student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1), eps,
            C=width, GATHER=not student_is_subset, WIDE=may_overflow(student.dtype, teacher.dtype),
            LOSS=loss, WEIGHTED=weight is not None, **_options(config),
        )  # fmt: skip

    config = configs[0]
    if batch * kept > 0:
        config = choose(
            "alignment_forward", _key(student, teacher, student_is_subset), configs, student,
            lambda config: launch(config, outputs(config)),
        )  # fmt: skip
    out = outputs(config)
    if batch * kept > 0:
        launch(config, out)
    return out, saved


def _backward(grad, student, teacher, subset, weight, saved, scale, student_is_subset, loss):
    """Launch the backward; returns the gradient of the student, all of it written by the one launch."""
    subset, saved = subset.contiguous(), saved.contiguous()
    batch, kept = subset.shape
    tokens, width = teacher.shape[1], int(student.shape[-1])
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    if batch * kept == 0:
        return out.zero_()
    rows = kept if student_is_subset else tokens
    strides = (0, 0) if loss else grad.stride()

    def launch(config):
        grid = (batch * -(-rows // config["ROWS"]),)
        shared = (grad, subset if weight is None else weight, student, teacher, subset, saved, out)
        sizes = (
            kept, batch * kept, *strides, batch * kept, scale,
            student.stride(0), student.stride(1), teacher.stride(0), teacher.stride(1),
        )  # fmt: skip
        flags = {"C": width, "LOSS": loss, "WEIGHTED": weight is not None, **_options(config)}
        if student_is_subset:
            wrap_triton(_backward_kernel)[grid](*shared, *sizes, **flags)
        else:
            wrap_triton(_backward_gather_kernel)[grid](
                *shared, tokens, *sizes, BLOCK_K=look_up_block(config), **flags
            )

    configs = configurations(width, _itemsize(student, teacher), gather_backward=not student_is_subset)
    launch(choose("alignment_backward", _key(student, teacher, student_is_subset), configs, student, launch))
    return out


# ---- Operators ---------------------------------------------------------------------------------------------


@kernel_op("maskalign_kernels::subset_cosine_alignment")
def _cosine_op(
    student: torch.Tensor, teacher: torch.Tensor, subset: torch.Tensor, student_is_subset: bool, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    return _forward(student, teacher, subset, None, student_is_subset, eps, False)


@kernel_op("maskalign_kernels::subset_cosine_alignment_backward")
def _cosine_backward_op(
    grad: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    subset: torch.Tensor,
    saved: torch.Tensor,
    student_is_subset: bool,
) -> torch.Tensor:
    return _backward(grad, student, teacher, subset, None, saved, 1.0, student_is_subset, False)


def _cosine_setup(ctx, inputs, output):
    student, teacher, subset, ctx.student_is_subset, _ = inputs
    ctx.save_for_backward(student, teacher, subset, output[1])


def _cosine_grad(ctx, grad, _):
    student, teacher, subset, saved = ctx.saved_tensors
    grad = _cosine_backward_op(grad, student, teacher, subset, saved, ctx.student_is_subset)
    return grad, None, None, None, None


_cosine_op.register_autograd(_cosine_grad, setup_context=_cosine_setup)


@kernel_op("maskalign_kernels::subset_cosine_alignment_loss")
def _loss_op(
    student: torch.Tensor,
    teacher: torch.Tensor,
    subset: torch.Tensor,
    weight: torch.Tensor | None,
    scale: float,
    student_is_subset: bool,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    partial, saved = _forward(student, teacher, subset, weight, student_is_subset, eps, True)
    loss = torch.empty((), dtype=torch.float32, device=student.device)
    if saved.numel() == 0:
        return loss.zero_(), saved
    count = subset.shape[0] * subset.shape[1]
    wrap_triton(_mean_kernel)[(1,)](
        partial, loss, partial.shape[0], count, scale, BLOCK=1024, num_warps=4, num_stages=1
    )
    return loss, saved


@kernel_op("maskalign_kernels::subset_cosine_alignment_loss_backward")
def _loss_backward_op(
    grad: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, subset: torch.Tensor,
    weight: torch.Tensor | None, saved: torch.Tensor, scale: float, student_is_subset: bool,
) -> torch.Tensor:  # fmt: skip
    return _backward(grad, student, teacher, subset, weight, saved, scale, student_is_subset, True)


def _loss_setup(ctx, inputs, output):
    student, teacher, subset, weight, ctx.scale, ctx.student_is_subset, _ = inputs
    ctx.save_for_backward(student, teacher, subset, weight, output[1])


def _loss_grad(ctx, grad, _):
    student, teacher, subset, weight, saved = ctx.saved_tensors
    grad = _loss_backward_op(grad, student, teacher, subset, weight, saved, ctx.scale, ctx.student_is_subset)
    return grad, None, None, None, None, None, None


_loss_op.register_autograd(_loss_grad, setup_context=_loss_setup)

# ---- Public functions --------------------------------------------------------------------------------------


def _check(op, student, teacher, subset, student_is_subset, eps):
    """Raise a ValueError for arguments that do not fit; returns them with dense rows (pitch between rows is
    kept).
    """
    sizes = {}
    floats = (*FLOATS, torch.float64)
    check_tensor(op, "teacher", teacher, "BNC", sizes, (*floats, torch.int8))
    if sizes["C"] == 0:
        fail(op, "teacher", teacher, "at least one channel")
    check_tensor(op, "subset", subset, "BK", sizes, INDICES, teacher.device)
    check_tensor(op, "student", student, "BKC" if student_is_subset else "BNC", sizes, floats, teacher.device)
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}; expected a number >= 0")
    if teacher.requires_grad and torch.is_grad_enabled():
        fail(op, "teacher", teacher, "no gradient: the teacher is frozen, pass teacher.detach()")
    # Only where two cosines would share one student row do duplicates matter.
    check_subset(op, subset, sizes["N"], distinct=not student_is_subset)
    return rows_contiguous(student), rows_contiguous(teacher)


def subset_cosine_alignment(student, teacher, subset, *, student_is_subset=True, eps=1e-12):
    """Cosine of student and teacher rows on a subset of the tokens; its negative mean is REPA's alignment
    loss.

    Differentiable with respect to `student` alone (once; the teacher is frozen).

    Args:
        student: (B, K, C) bfloat16, float16 or float32, row for row with `subset`; or (B, N, C), rows to be
            gathered, with student_is_subset=False, whose gradient is zero outside the subset. float64 on the
            CPU reference only.
        teacher: (B, N, C) of the same types or int8 (the cosine ignores the scale of a row, so int8 rows need
            none). Rows of either tensor may lie at any pitch (views); nothing is copied as long as a row is
            dense.
        subset: (B, K) int32 or int64 token indices in [0, N), 0 <= K. Sorted or not; no duplicates when rows
            are gathered.
        student_is_subset: how the rows of `student` are laid out.
        eps: smallest norm to divide by, as in torch.nn.functional.normalize.

    Returns:
        (B, K) float32 (float64 where an argument is).

    Raises:
        ValueError: an argument's type, shape or device does not fit, the teacher requires a gradient, or (on
            the CPU, and on a GPU with MASKALIGN_KERNELS_DEBUG=1) an index is out of range or repeated where
            it matters.
    """
    student, teacher = _check(OP, student, teacher, subset, student_is_subset, eps)
    if not use_triton(student, teacher, subset):
        return reference.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)
    check_interpretable(OP, student=student, teacher=teacher)
    return _cosine_op(student, teacher, subset, student_is_subset, float(eps))[0]


def subset_cosine_alignment_loss(student, teacher, subset, *, weight=1.0, student_is_subset=True, eps=1e-12):
    """The alignment loss -mean(weight * cosine) over all B x K tokens, with the mean and the weight inside
    the kernels.

    One launch reads the rows and leaves one sum per program, a second one adds those in a fixed order, so the
    result is the same on every run. The mean over no tokens at all (K = 0) is zero here, not NaN.

    Args:
        weight: a number, or a tensor of shape (B,), one weight per image (no gradient flows to it).
        student, teacher, subset, student_is_subset, eps: as in `subset_cosine_alignment`.

    Returns:
        a float32 scalar (float64 where an argument is).
    """
    op = f"{OP}_loss"
    student, teacher = _check(op, student, teacher, subset, student_is_subset, eps)
    per_image, scale = None, weight
    if isinstance(weight, torch.Tensor):
        check_tensor(
            op, "weight", weight, "B", {"B": subset.shape[0]}, (*FLOATS, torch.float64), subset.device
        )
        if weight.requires_grad and torch.is_grad_enabled():
            fail(op, "weight", weight, "no gradient: pass weight.detach()")
        per_image, scale = weight.contiguous(), 1.0
    if not use_triton(student, teacher, subset):
        cosine = reference.subset_cosine_alignment(student, teacher, subset, student_is_subset, eps)
        if cosine.numel() == 0:
            return cosine.sum()
        return -scale * (cosine if per_image is None else cosine * per_image.unsqueeze(1)).mean()
    check_interpretable(op, student=student, teacher=teacher, weight=per_image)
    if torch.compiler.is_compiling():
        # A number that changes from step to step is symbolic in a graph; there the product costs nothing
        # either.
        return scale * _loss_op(student, teacher, subset, per_image, 1.0, student_is_subset, float(eps))[0]
    return _loss_op(student, teacher, subset, per_image, float(scale), student_is_subset, float(eps))[0]
