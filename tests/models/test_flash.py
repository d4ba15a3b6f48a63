"""`model.attention flash_attn`: refused where it cannot work, and the same numbers through the package's layout."""

import sys
import types
from importlib.machinery import ModuleSpec

import pytest
import torch

from maskalign.errors import UsageError
from maskalign.models import flash, layers


@pytest.fixture
def package(monkeypatch):
    """A stand-in for flash-attn 2: its function takes and gives (B, N, heads, head width)."""
    calls = []

    def flash_attn_func(q, k, v):
        calls.append(q.shape)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    module = types.ModuleType("flash_attn")
    module.flash_attn_func, module.__spec__ = flash_attn_func, ModuleSpec("flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    flash.flash_function.cache_clear()
    yield calls
    flash.flash_function.cache_clear()


def test_without_the_package_training_is_refused(monkeypatch):
    monkeypatch.setattr(flash, "flash_package", lambda: None)
    with pytest.raises(UsageError, match=r"model.attention: flash_attn needs the package flash-attn.*\[flash\]"):
        flash.check_flash("cuda", "bf16")
    flash.flash_function.cache_clear()
    with pytest.raises(UsageError, match="model.attention: flash_attn needs the package"):
        layers.Attention(24, 3, implementation="flash_attn")


@pytest.mark.parametrize(
    "device, precision, message", [("cpu", "bf16", "GPUs only"), ("cuda", "fp32", "training.precision bf16")]
)
def test_where_it_cannot_run_it_is_refused(package, device, precision, message):
    with pytest.raises(UsageError, match=message):
        flash.check_flash(device, precision)
    flash.check_flash("cuda", "bf16")


def test_the_package_gets_its_layout(package, monkeypatch, seed):
    torch.manual_seed(seed)
    attention = layers.Attention(24, 3, qk_norm=True, implementation="flash_attn")
    plain = layers.Attention(24, 3, qk_norm=True, implementation="math")
    plain.load_state_dict(attention.state_dict())
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(attention(x), plain(x))  # float32 on a CPU: torch's own kernel
    assert package == []
    monkeypatch.setattr(layers, "fits_flash", lambda x: True)
    torch.testing.assert_close(attention(x), plain(x))
    assert package == [(2, 7, 3, 8)]
