"""How subset_cosine_alignment is launched: configurations, launches, and the operators with their gradients.

The kernels, and what they compute, are in kernels.py.
"""

import torch

from ..operators import WARP_SIZE, kernel_op, wrap_triton
from ..transforms import differentiable, first_gradient
from ..tuning import choose
from .kernels import backward_gather_kernel, backward_kernel, forward_kernel, mean_kernel


def configurations(width, itemsize, gather_backward=False):
    """The configurations of the row kernels; the first is the default.

    Args:
        width: C.
        itemsize: bytes of an element of the narrower of student and teacher.
        gather_backward: whether this is for backward_gather_kernel, which searches for its tokens in the subset.

    A row is read in steps of BLOCK_C columns. A step is at most what one warp loads with 16 bytes per lane, so that
    sums stay within the warp, unless there would be more than eight steps. It is smaller where that leaves fewer lanes
    idle at the end of the row (C = 320 is read as 5 x 64). ROWS is such that every thread has at least one 16-byte load
    per step, even of the narrower dtype. The alternatives are two such loads per step and thread in half as many
    programs, and twice the rows with twice the threads. Half as many threads, or twice the rows of the gathering
    backward, spill a few registers on sm_80 and sm_90. A forward program of more than 4096 elements per step, as for
    int8 rows of more than 4096 columns, spills on sm_100. The gathering backward takes 16 rows unless they are long,
    so that the search, which every program repeats, reads only a few percent of the rows' bytes.
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
    if gather_backward:
        return configs[:2]
    return configs if 2 * rows * block <= 4096 else configs[:1]


def look_up_block(config):
    """The number of subset entries compared at a time: at most 4096 comparisons per step, which fit in registers."""
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
    """Launch the forward; returns the cosines (B, K), or with `loss` each program's sum, and the saved scalars."""
    subset = subset.contiguous()  # Nearly always contiguous already, and small.
    batch, kept = subset.shape
    width = int(student.shape[-1])
    saved = torch.empty((3, batch, kept), dtype=torch.float32, device=student.device)
    configs = configurations(width, _itemsize(student, teacher))

    def outputs(config):
        shape = (batch * -(-kept // config["ROWS"]),) if loss else (batch, kept)
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    def launch(config, out):
        wrap_triton(forward_kernel)[(batch * -(-kept // config["ROWS"]),)](
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
    """Launch the backward; returns the gradient of the student, which one launch writes completely."""
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
            wrap_triton(backward_kernel)[grid](*shared, *sizes, **flags)
        else:
            wrap_triton(backward_gather_kernel)[grid](*shared, tokens, *sizes, BLOCK_K=look_up_block(config), **flags)

    configs = configurations(width, _itemsize(student, teacher), gather_backward=not student_is_subset)
    launch(choose("alignment_backward", _key(student, teacher, student_is_subset), configs, student, launch))
    return out


# ---- Operators ---------------------------------------------------------------------------------------------


@kernel_op("maskalign_kernels::subset_cosine_alignment")
def cosine_op(
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
    ctx.set_materialize_grads(False)  # `saved` has no gradient; otherwise a launch would fill one with zeros.
    student, teacher, subset, ctx.student_is_subset, _ = inputs
    ctx.save_for_backward(student, teacher, subset, output[1])


_cosine_gradient = first_gradient("subset_cosine_alignment", _cosine_backward_op)


def _cosine_grad(ctx, grad, _):
    student, teacher, subset, saved = ctx.saved_tensors
    grad = _cosine_gradient(grad, student, teacher, subset, saved, ctx.student_is_subset)
    return grad, None, None, None, None


cosine = differentiable("subset_cosine_alignment", cosine_op, _cosine_grad, _cosine_setup)


@kernel_op("maskalign_kernels::subset_cosine_alignment_loss")
def loss_op(
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
    wrap_triton(mean_kernel)[(1,)](partial, loss, partial.shape[0], count, scale, BLOCK=1024, num_warps=4, num_stages=1)
    return loss, saved


@kernel_op("maskalign_kernels::subset_cosine_alignment_loss_backward")
def _loss_backward_op(
    grad: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, subset: torch.Tensor,
    weight: torch.Tensor | None, saved: torch.Tensor, scale: float, student_is_subset: bool,
) -> torch.Tensor:  # fmt: skip
    return _backward(grad, student, teacher, subset, weight, saved, scale, student_is_subset, True)


def _loss_setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    student, teacher, subset, weight, ctx.scale, ctx.student_is_subset, _ = inputs
    ctx.save_for_backward(student, teacher, subset, weight, output[1])


_loss_gradient = first_gradient("subset_cosine_alignment_loss", _loss_backward_op)


def _loss_grad(ctx, grad, _):
    student, teacher, subset, weight, saved = ctx.saved_tensors
    grad = _loss_gradient(grad, student, teacher, subset, weight, saved, ctx.scale, ctx.student_is_subset)
    return grad, None, None, None, None, None, None


loss = differentiable("subset_cosine_alignment_loss", loss_op, _loss_grad, _loss_setup)
