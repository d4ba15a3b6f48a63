"""Shared by the operations on any machine: whether a call runs the kernels, and how its arguments are checked.

Neither Triton nor PyTorch's compiler is imported here: a call on a CPU does not need them, and importing both takes
seconds. The part that needs Triton is in operators.py.

Environment variables:
    TRITON_INTERPRET=1: Triton interprets its kernels on the CPU. The public functions then take the Triton path on CPU
        tensors too. The variable is read once, when this package is imported; set it before starting Python.
    MASKALIGN_KERNELS_DEBUG=1: check the indices of a subset on a GPU as well (costs one synchronization per call).
    MASKALIGN_KERNELS_AUTOTUNE=1: see tuning.py.
"""

import importlib.util
import os

import torch

# Some platforms, such as macOS, have no Triton wheel. The CPU path works without it.
HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INDICES = (torch.int32, torch.int64)


def use_triton(*tensors):
    """Whether a call with these tensors runs the kernels: on CUDA and ROCm always, on the CPU under the interpreter."""
    if not HAS_TRITON:
        return False
    return INTERPRET or any(t is not None and t.device.type == "cuda" for t in tensors)


def debug():
    """Whether MASKALIGN_KERNELS_DEBUG enables the checks that cost a synchronization on a GPU."""
    return os.environ.get("MASKALIGN_KERNELS_DEBUG", "0") not in ("", "0")


# ---- Argument checks: every error is a ValueError with the argument's name, its description and what was expected


def describe(tensor):
    """The description of a tensor for an error message, such as 'of shape (2, 3), float32, on cpu'."""
    if not isinstance(tensor, torch.Tensor):
        return f"a {type(tensor).__name__}"
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"of shape {tuple(tensor.shape)}, {dtype}, on {tensor.device}"


def fail(op, name, tensor, expected):
    raise ValueError(f"{op}: {name} is {describe(tensor)}; expected {expected}")


def check_tensor(op, name, tensor, dims, sizes, dtypes, device=None):
    """Check one argument, and record the sizes of its dimensions.

    Args:
        op: the public function, for the message.
        name: the argument's name, for the message.
        dims: one letter per dimension, such as "BNC".
        sizes: dict from letter to size; letters not yet in it are added from this tensor.
        dtypes: the accepted dtypes.
        device: the device of the previous arguments, or None for the first one.

    Raises:
        ValueError: the argument's type, shape, dtype or device does not fit.
    """
    # Messages are formatted only after a check has failed: formatting a symbolic size would make it constant in the
    # graph.
    if not isinstance(tensor, torch.Tensor):
        fail(op, name, tensor, f"a tensor of shape {_spell(dims, sizes)}")
    if tensor.dim() != len(dims):
        fail(op, name, tensor, f"{len(dims)} dimension{'s' * (len(dims) != 1)}, {_spell(dims, sizes)}")
    for letter, size in zip(dims, tensor.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            fail(op, name, tensor, f"shape {_spell(dims, sizes)}")
    if tensor.dtype not in dtypes:
        fail(op, name, tensor, "dtype " + " or ".join(str(d).removeprefix("torch.") for d in dtypes))
    if device is not None and tensor.device != device:
        fail(op, name, tensor, f"device {device}, as the arguments before it")


def _spell(dims, sizes):
    """'(B=2, N, C=64)': the dimensions, with the sizes that are known."""
    spelled = ", ".join(f"{d}={sizes[d]}" if d in sizes else d for d in dims)
    return f"({spelled},)" if len(dims) == 1 else f"({spelled})"


def check_subset(op, subset, num_tokens, distinct):
    """Check that every index lies in [0, num_tokens), and with `distinct` that no row of `subset` repeats one.

    The check needs the values. It always runs on the CPU, on a GPU only with MASKALIGN_KERNELS_DEBUG=1, because it
    costs a synchronization there, and never while a graph is traced.

    Raises:
        ValueError: an index is out of range or repeated.
    """
    if torch.compiler.is_compiling() or subset.numel() == 0 or is_abstract(subset):
        return
    if subset.device.type != "cpu" and not debug():
        return
    low, high = (int(v) for v in torch.aminmax(subset))
    if low < 0 or high >= num_tokens:
        fail(op, "subset", subset, f"indices in [0, {num_tokens}), found {low if low < 0 else high}")
    if distinct:
        ordered = subset.sort(dim=1).values
        repeated = ordered[:, 1:] == ordered[:, :-1]
        if bool(repeated.any()):
            row, column = (int(v) for v in repeated.nonzero()[0])
            fail(
                op,
                "subset",
                subset,
                f"distinct indices per row, found {int(ordered[row, column])} twice in row {row}",
            )


def is_abstract(tensor):
    """Whether a tensor has no data of its own (fake, meta, functional, batched by vmap), so no values to check."""
    if torch._C._functorch.is_batchedtensor(tensor):  # pyright: ignore
        return True
    return tensor.device.type == "meta" or type(tensor) not in (torch.Tensor, torch.nn.Parameter)


def check_interpretable(op, **tensors):
    """Refuse float64 on the Triton path, whose arithmetic is float32."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype == torch.float64:
            fail(op, name, tensor, "bfloat16, float16 or float32 (float64 runs on the CPU reference only)")
