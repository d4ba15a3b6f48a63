"""The launches of subset_cosine_alignment for the compile report: arguments and configurations, bytes and FLOPs."""

import torch

from ..aot import Case
from . import kernels
from . import launch as alignment
from .operations import OP

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8"}
SHAPES = [
    # (images, tokens, kept, channels, dtypes of student and teacher). XL/2 with DINOv2-B in every combination of dtypes
    # that is used, then DINOv2-L at 512 px, the quickstart's EfficientNet, and the widest row.
    (32, 256, 128, 768, torch.bfloat16, torch.bfloat16),
    (32, 256, 128, 768, torch.bfloat16, torch.int8),
    (32, 256, 128, 768, torch.float16, torch.float16),
    (32, 256, 128, 768, torch.float32, torch.float32),
    (32, 256, 128, 768, torch.float32, torch.int8),
    (8, 1024, 512, 1024, torch.bfloat16, torch.float16),
    (64, 64, 32, 320, torch.bfloat16, torch.int8),
    (8, 256, 128, 8192, torch.bfloat16, torch.int8),
    (8, 256, 128, 8192, torch.float32, torch.float32),
]


def count_bytes(direction, gather, loss, images, tokens, kept, width, student, teacher, programs):
    """(moved, least): the bytes that one launch moves, and the least that it could move.

    student and teacher are bytes per element; indices are int64. All rows are read and written once. The scalars of an
    image are read once by each of its programs.
    """
    total = images * kept
    rows = total * width * (student + teacher)
    index, saved, cosine, scalar = 8, 12, 4, 4
    if direction == "forward":
        fixed = rows + total * (index + saved)
        # With the loss, every program reads its image's weight and writes one sum.
        return (
            (fixed + programs * 2 * scalar, fixed + images * scalar + scalar) if loss else (fixed + total * cosine,) * 2
        )
    written = images * (tokens if gather else kept) * width * student
    least = rows + written + total * (index + saved) + (images * scalar + scalar if loss else total * cosine)
    per_program = 2 * scalar if loss else 0
    if gather:  # Every program reads the whole subset of its image, and the gradients of these cosines.
        per_program += kept * (index if loss else index + cosine)
        return rows + written + total * saved + programs * per_program, least
    return rows + written + total * (index + saved) + (0 if loss else total * cosine) + programs * per_program, least


def aot_cases(shapes=None, every_configuration=True):
    """Yield a Case for every launch of both functions, forward and backward, student gathered or not."""
    for images, tokens, kept, width, student, teacher in shapes or SHAPES:
        shape = f"B{images} N{tokens} K{kept} C{width} {_TYPES[student]}/{_TYPES[teacher]}"
        for gather in (False, True):
            for loss in (False, True):
                for direction in ("forward", "backward"):
                    looks_up = gather and direction == "backward"
                    narrow = min(student.itemsize, teacher.itemsize)
                    configs = alignment.configurations(width, narrow, gather_backward=looks_up)
                    for number, config in enumerate(configs if every_configuration else configs[:1]):
                        programs = images * -(-(tokens if looks_up else kept) // config["ROWS"])
                        moved, least = count_bytes(
                            direction,
                            gather,
                            loss,
                            images,
                            tokens,
                            kept,
                            width,
                            student.itemsize,
                            teacher.itemsize,
                            programs,
                        )
                        sizes = (images, tokens, kept, width)
                        kernel, arguments, constexprs = _launch(
                            direction, gather, loss, sizes, student, teacher, config
                        )
                        yield Case(
                            operation=OP + "_loss" * loss,
                            direction=direction,
                            launch="gathered rows" if gather else "rows",
                            shape=shape,
                            config=" ".join(f"{k}={v}" for k, v in config.items()) if number else "default",
                            kernel=kernel,
                            arguments=arguments,
                            constexprs=constexprs,
                            num_stages=1,
                            num_warps=config["threads"] // 32,
                            waves=config["threads"] // 64,
                            grid=(programs,),
                            moved=moved,
                            least=least,
                            flops=images * kept * width * (6 if direction == "forward" else 4),
                            rows=("student_ptr", "teacher_ptr", "out_ptr"),
                        )
                        if loss and direction == "forward":
                            yield _mean_case(shape, gather, programs, images * kept, number, config)


def _launch(direction, gather, loss, sizes, student, teacher, config):
    """(kernel, arguments, constexprs) as the launchers pass them for contiguous tensors."""
    images, tokens, kept, width = sizes
    kernel = kernels.forward_kernel
    if direction == "backward":
        kernel = kernels.backward_gather_kernel if gather else kernels.backward_kernel
    pointers = dict.fromkeys(("grad_ptr", "weight_ptr", "saved_ptr", "cosine_ptr"), "*fp32") | {"subset_ptr": "*i64"}
    pointers |= {
        "teacher_ptr": _pointer(teacher),
        "student_ptr": _pointer(student),
        "out_ptr": _pointer(student),
    }
    numbers = {
        "tokens": tokens,
        "kept": kept,
        "saved_plane": images * kept,
        "count": images * kept,
        "scale": 1.0,
        "eps": 1e-12,
        "student_batch": (tokens if gather else kept) * width,
        "student_row": width,
        "teacher_batch": tokens * width,
        "teacher_row": width,
        "grad_batch": 0 if loss else kept,
        "grad_token": 0 if loss else 1,
    }
    constexprs = {
        "C": width,
        "ROWS": config["ROWS"],
        "BLOCK_C": config["BLOCK_C"],
        "BLOCK_K": alignment.look_up_block(config),
        "GATHER": gather,
        "WIDE": alignment.may_overflow(student, teacher),
        "LOSS": loss,
        "WEIGHTED": loss,
    }
    arguments = pointers | numbers
    names = kernel.arg_names
    return (
        kernel,
        {n: arguments[n] for n in names if n in arguments},
        {n: constexprs[n] for n in names if n in constexprs},
    )


def _pointer(dtype):
    return "*" + {torch.int8: "i8"}.get(dtype, _TYPES[dtype])


def _mean_case(shape, gather, programs, count, number, config):
    return Case(
        operation=OP + "_loss",
        direction="forward",
        launch="gathered mean" if gather else "mean",
        shape=shape,
        config=" ".join(f"{k}={v}" for k, v in config.items()) if number else "default",
        kernel=kernels.mean_kernel,
        constexprs={"BLOCK": 1024},
        num_warps=4,
        waves=4,
        num_stages=1,
        grid=(1,),
        arguments={
            "partial_ptr": "*fp32",
            "loss_ptr": "*fp32",
            "programs": programs,
            "count": count,
            "scale": 1.0,
        },
        moved=4 * programs + 4,
        least=4 * programs + 4,
        flops=programs,
    )
