"""FlashAttention from its own package, for `model.attention flash_attn`.

FlashAttention-4 (`flash_attn.cute`) is activated inside torch's scaled_dot_product_attention; FlashAttention-2 is
called directly. Importing this file does not import torch.
"""

import functools
import importlib
import importlib.util

from maskalign.errors import UsageError

MISSING = (
    "model.attention: flash_attn needs the package flash-attn, which is not installed; install it "
    "(pip install -e '.[flash]') or use sdpa"
)


def flash_package():
    """The version that is installed and usable: `FA4`, `FA2` or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    try:
        has_cute = importlib.util.find_spec("flash_attn.cute") is not None
    except (ImportError, ValueError):
        has_cute = False
    if has_cute:
        attention = importlib.import_module("torch.nn.attention")
        if "FA4" in getattr(attention, "list_flash_attention_impls", list)():
            return "FA4"
    return "FA2"


def check_flash(device, precision):
    """Check that `model.attention flash_attn` can work.

    Args:
        device: the device of the run: cpu, cuda, cuda:N or auto.
        precision: fp32, bf16 or auto.

    Raises:
        UsageError: the package is missing, the device is a CPU, or the precision is fp32.
    """
    if flash_package() is None:
        raise UsageError(MISSING)
    if str(device).startswith("cpu"):
        raise UsageError("model.attention: flash_attn runs on GPUs only; use auto or sdpa with training.device cpu")
    if precision == "fp32":
        raise UsageError("model.attention: flash_attn computes in bf16; set training.precision bf16, or use sdpa")


@functools.cache
def flash_function():
    """The attention function of the installed package, or None if torch's SDPA calls it.

    Returns:
        A function of q, k, v, each (B, N, heads, head width) in half precision on a GPU, that returns a tensor of the
        same shape; or None (FlashAttention-4).

    Raises:
        UsageError: the package is not installed.
    """
    package = flash_package()
    if package is None:
        raise UsageError(MISSING)
    if package == "FA4":
        importlib.import_module("torch.nn.attention").activate_flash_attention_impl("FA4")
        return None
    return importlib.import_module("flash_attn").flash_attn_func
