"""The precision that suits a processor, and what tuning the host leaves unchanged."""

import torch

from maskalign.runtime import device


def test_precision_follows_the_processor(monkeypatch):
    cpu = torch.device("cpu")
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(device, "cpu_has_bf16", lambda has=has: has)
        assert device.compute_dtype("auto", cpu) == expected
    assert device.compute_dtype("fp32", cpu) == torch.float32
    assert device.compute_dtype("bf16", cpu) == torch.bfloat16


def test_tuning_keeps_float32_exact():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(300, 200, generator=g), torch.randn(100, 200, generator=g)
    device.tune_host(torch.device("cpu"))
    try:
        exact = a.double() @ b.double().T
        assert (torch.nn.functional.linear(a, b).double() - exact).norm() / exact.norm() < 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")
