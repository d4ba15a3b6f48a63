"""The operations on a real GPU (CUDA or ROCm): `pytest -m gpu`. Elsewhere skipped, and said to be."""

import functools
import os
import subprocess
import sys

import pytest
import torch

import maskalign_kernels
from maskalign_kernels import (
    gated_residual_adaln,
    keyed_random,
    mix_and_drop,
    subset_cosine_alignment,
    subset_cosine_alignment_loss,
    tuning,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device here"),
]
F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
SHAPES = [
    (2, 7, 3, 33),
    (3, 20, 9, 8),
    (2, 64, 32, 320),
    (4, 256, 128, 768),
    (2, 16, 5, 1152),
    (1, 9, 4, 8192),
]
ADALN_SHAPES = [(2, 37, 18, 40), (1, 70, None, 130), (2, 257, 193, 1152), (2, 256, None, 768), (1, 9, 4, 4096)]
MIX_SHAPES = [(2, 63, 31, 40, 13), (2, 256, 128, 384, 64), (1, 196, None, 200, 128), (2, 256, 64, 1152, 64)]


@pytest.mark.parametrize("student", [F32, F16, BF16])
@pytest.mark.parametrize("teacher", [F32, F16, BF16, INT8])
@pytest.mark.parametrize("gathered", [False, True])
def test_alignment(student, teacher, gathered, alignment_case, cosine_truth, relative, tolerance, poisoned, generator):
    for number, (B, N, K, C) in enumerate(SHAPES):
        index = (torch.int32, torch.int64)[number % 2]
        s, z, subset = alignment_case(B, N, K, C, student, teacher, gathered, index)
        weights = torch.randn(B, K, generator=generator)
        exact = s.detach().double().requires_grad_()
        expected = cosine_truth(exact, z, subset, not gathered)
        (expected * weights).sum().backward()
        s, z, subset, weights = s.detach().cuda().requires_grad_(), z.cuda(), subset.cuda(), weights.cuda()
        out = subset_cosine_alignment(s, z, subset, student_is_subset=not gathered)
        (out * weights).sum().backward()
        assert relative(out.cpu(), expected) < 3e-6
        assert relative(s.grad.cpu(), exact.grad) < tolerance(student)
        loss = subset_cosine_alignment_loss(s, z, subset, weight=0.5, student_is_subset=not gathered)
        assert abs(float(loss) + 0.5 * float(expected.mean())) < 1e-5


def mix_arguments(B, N, D, T, dtype, generator):
    sizes = [(B, N, D), (B, D), (B, D), (B, D), (T, N), (T,), (N, T), (N,)]
    scales = [1, 1, 0.3, 1, N**-0.5, 0.1, T**-0.5, 0.1]
    return [
        (torch.randn(s, generator=generator) * a).to(dtype).cuda().requires_grad_()
        for s, a in zip(sizes, scales, strict=True)
    ]


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
def test_mix_and_drop(dtype, relative, generator, poisoned):
    from benchmarks.kernel_report import unfused_mix

    limit = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[dtype]
    for B, N, K, D, T in MIX_SHAPES:
        arguments = mix_arguments(B, N, D, T, dtype, generator)
        subset = None if K is None else torch.rand(B, N, generator=generator).argsort(1)[:, :K].cuda()
        exact = [a.detach().double().requires_grad_() for a in arguments]
        out, expected = mix_and_drop(*arguments, subset), unfused_mix(*exact, subset)
        weights = torch.randn(expected.shape, generator=generator).cuda()
        assert relative(out, expected) < limit
        grads = torch.autograd.grad(out, arguments, weights.to(out.dtype))
        for grad, true in zip(grads, torch.autograd.grad(expected, exact, weights.double()), strict=True):
            assert relative(grad, true) < 2 * limit


@pytest.mark.parametrize("operation", ["adaln_modulate", "gated_residual", "gated_residual_adaln"])
@pytest.mark.parametrize("dtype, others", [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16)])
def test_adaln(operation, dtype, others, adaln_case, adaln_truth, relative, generator, poisoned):
    function, truth = getattr(maskalign_kernels, operation), adaln_truth[operation]
    limit = {F32: 2e-5, F16: 4e-3, BF16: 3e-2}[others]
    for B, N, K, D in ADALN_SHAPES:
        tensors, subset = adaln_case(operation, B, N, D, K, dtype, others)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        leaves = [t.detach().cuda().requires_grad_() for t in tensors]
        results, on_gpu = [], None if subset is None else subset.cuda()
        for f, arguments, index in ((function, leaves, on_gpu), (truth, exact, subset)):
            out = f(*arguments, index)
            outs = out if isinstance(out, tuple) else (out,)
            weights = torch.linspace(-1, 1, outs[0].numel(), device=outs[0].device).view(outs[0].shape)
            results.append([*outs, *torch.autograd.grad(outs, arguments, [weights.to(o.dtype) for o in outs])])
        for found, true in zip(*results, strict=True):
            assert relative(found.cpu(), true) < 2 * limit


def test_adaln_runs_repeat_without_waiting(adaln_case):
    """Compiled and plain: the same bits each time, and nothing waits for the GPU."""
    tensors, subset = adaln_case("gated_residual_adaln", 8, 257, 1152, 193, BF16)
    leaves, subset = [t.detach().cuda().requires_grad_() for t in tensors], subset.cuda()

    def loss(*arguments):
        y, u = gated_residual_adaln(*arguments)
        return y.float().square().mean() + u.float().square().mean()

    torch._dynamo.reset()
    for function in (loss, torch.compile(loss, fullgraph=True)):
        first = torch.autograd.grad(function(*leaves, subset), leaves)
        torch.cuda.set_sync_debug_mode("error")
        try:
            second = torch.autograd.grad(function(*leaves, subset), leaves)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def both(s, z, subset, *mixer):
    return subset_cosine_alignment_loss(s, z, subset) + mix_and_drop(*mixer, subset).float().square().mean()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_graph_break(dynamic, alignment_case, relative, generator):
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, dynamic=dynamic)
    for B in (2, 3):
        s, z, subset = (t.detach().cuda() for t in alignment_case(B, 64, 32, 320, BF16, INT8))
        leaves = [s.requires_grad_(), *mix_arguments(B, 64, 96, 16, BF16, generator)]
        results = [torch.autograd.grad(f(s, z, subset, *leaves[1:]), leaves) for f in (both, compiled)]
        for eager, graph in zip(*results, strict=True):
            assert relative(graph, eager) < 2e-2


def test_opcheck(alignment_case, generator):
    s, z, subset = (t.detach().cuda() for t in alignment_case(2, 16, 8, 64, BF16, INT8))
    ops = torch.ops.maskalign_kernels
    torch.library.opcheck(ops.subset_cosine_alignment.default, (s.requires_grad_(), z, subset, True, 1e-12))
    torch.library.opcheck(ops.subset_cosine_alignment_loss.default, (s, z, subset, None, 1.0, True, 1e-12))
    torch.library.opcheck(ops.mix_and_drop.default, (*mix_arguments(2, 16, 64, 16, BF16, generator), subset, BF16))


def test_runs_repeat_bit_for_bit(alignment_case, generator):
    s, z, subset = (t.detach().cuda() for t in alignment_case(8, 256, 128, 768, BF16, INT8))
    leaves = [s.requires_grad_(), *mix_arguments(8, 256, 384, 64, BF16, generator)]
    first, second = (torch.autograd.grad(both(s, z, subset, *leaves[1:]), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_waits_for_the_gpu(alignment_case, generator):
    s, z, subset = (t.detach().cuda() for t in alignment_case(2, 64, 32, 320, BF16, INT8))
    leaves = [s.requires_grad_(), *mix_arguments(2, 64, 96, 16, BF16, generator)]
    run = functools.partial(both, s, z, subset, *leaves[1:])
    run().backward()  # Compiles the kernels.
    torch.cuda.set_sync_debug_mode("error")
    try:
        run().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_debug_mode_checks_the_indices(alignment_case, monkeypatch):
    s, z, subset = (t.detach().cuda() for t in alignment_case(2, 16, 8, 64))
    subset[1, 2] = 16
    monkeypatch.setenv("MASKALIGN_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"indices in \[0, 16\), found 16"):
        subset_cosine_alignment(s, z, subset)


def test_tuning_chooses_once_and_remembers(alignment_case, generator, monkeypatch, tmp_path):
    monkeypatch.setenv("MASKALIGN_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("MASKALIGN_KERNELS_CACHE", str(tmp_path / "choices.json"))
    s, z, subset = (t.detach().cuda() for t in alignment_case(8, 64, 32, 320, BF16, INT8))
    run = functools.partial(both, s.requires_grad_(), z, subset, *mix_arguments(8, 64, 96, 16, BF16, generator))
    run().backward()
    text = (tmp_path / "choices.json").read_text()
    for launch in ("alignment_forward", "alignment_backward", "statistics", "mix", "hidden", "tokens"):
        assert f"|{launch}|" in text, launch
    tuning.forget()
    run().backward()
    assert (tmp_path / "choices.json").read_text() == text


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_launches_on_the_device_of_the_tensors(alignment_case, generator):
    """The current device is the first one, the tensors are on the second."""
    s, z, subset = (t.detach().to("cuda:1") for t in alignment_case(2, 64, 32, 320, BF16, INT8))
    mixer = [t.detach().to("cuda:1").requires_grad_() for t in mix_arguments(2, 64, 96, 16, BF16, generator)]
    leaves = [s.requires_grad_(), *mixer]
    with torch.cuda.device(0):
        away = torch.autograd.grad(both(s, z, subset, *mixer), leaves)
    with torch.cuda.device(1):
        home = torch.autograd.grad(both(s, z, subset, *mixer), leaves)
    assert all(torch.equal(a, b) for a, b in zip(away, home, strict=True))


def test_no_device_is_too_small_for_many_images(generator):
    """More images than a grid's second dimension would take."""
    arguments = mix_arguments(70_000, 2, 16, 4, BF16, generator)
    out = mix_and_drop(*arguments)
    few = mix_and_drop(*(a[-3:] if a.shape[:1] == (70_000,) else a for a in arguments))
    assert torch.equal(out[-3:], few)
    assert torch.autograd.grad(out.float().sum(), arguments)[0].isfinite().all()


@pytest.mark.parametrize("size, key", [(1, 0), (37, 1), (5000, 2**62 + 12345)])
def test_keyed_random(size, key):
    """Against Philox in Python's integers at one place; rows do not depend on who asks for them."""
    first, stream, rows = 2**31 - 20, 7, 5
    found = keyed_random(key, stream, first, rows, size, device="cuda").cpu()
    row, column = rows // 2, size // 2
    quarter = -(-size // 4)
    counter, words = [column % quarter, first + row, stream, 0], [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [b >> 32 ^ counter[1] ^ words[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ words[1], a & 0xFFFFFFFF]
        words = [(words[0] + 0x9E3779B9) & 0xFFFFFFFF, (words[1] + 0xBB67AE85) & 0xFFFFFFFF]
    word = counter[column // quarter]
    assert abs(float(found[row, column]) - (0xFFFFFFFF - word if word >> 31 else word) / 2**31) < 2e-7
    halves = [keyed_random(key, stream, first + at, count, size, device="cuda").cpu() for at, count in ((0, 2), (2, 3))]
    assert torch.equal(torch.cat(halves), found)
    normal = keyed_random(key, stream, 0, 2000, size, normal=True, device="cuda").double()
    assert abs(float(normal.mean())) < 5 / normal.numel() ** 0.5
    assert abs(float(normal.square().mean()) - 1) < 5 * (2 / normal.numel()) ** 0.5


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path):
    command = [sys.executable, "-m", "benchmarks.kernels", "--quick", "--out", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=os.environ)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-2000:]
    assert (tmp_path / "kernels.csv").exists() and (tmp_path / "kernels.png").exists()
