"""The CPU path, timed by pytest-benchmark: `pytest tests/kernels/test_benchmark_cpu.py --benchmark-enable`.

On a machine with other work, `OMP_NUM_THREADS=1` and `--benchmark-timer=time.process_time` count the processor's time.

The groups pair our CPU path with the chain as training codes write it. No speed is reported of a wrong result: whatever
is timed is held to the definition in float64. In a plain run each case runs once, on fewer images and unmeasured.
"""

import pytest
import torch

from benchmarks.kernel_report import unfused_alignment, unfused_mix
from benchmarks.kernels import command
from maskalign_kernels import mix_and_drop, subset_cosine_alignment

BF16, F16, F32, INT8 = torch.bfloat16, torch.float16, torch.float32, torch.int8
# The chain rounds to the dtype after each of its operations.
ROUNDINGS = {"ours": 2, "chain": 8}
every_provider = pytest.mark.parametrize("provider", ROUNDINGS)


@every_provider
@pytest.mark.parametrize("teacher", [INT8, F16])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("shape", [(8, 256, 128, 768), (64, 64, 32, 320)], ids=str)
def test_alignment_forward_and_backward(
    benchmark, shape, dtype, teacher, provider, alignment_case, cosine_truth, relative, tolerance
):
    benchmark.group = f"alignment {shape} {dtype} {teacher}"
    s, z, subset = alignment_case(*(shape if benchmark.enabled else (2, *shape[1:])), dtype, teacher)
    function = {"ours": subset_cosine_alignment, "chain": unfused_alignment}[provider]

    def step():
        cosine = function(s, z, subset)
        return cosine, *torch.autograd.grad(-cosine.mean(), s)

    cosine, gradient = benchmark(step)
    exact = s.detach().double().requires_grad_()
    expected = cosine_truth(exact, z, subset)
    (true,) = torch.autograd.grad(-expected.mean(), exact)
    # Random rows have small cosines: an error is one of the unit vectors, not of their product.
    limit = ROUNDINGS[provider] * tolerance(dtype)
    assert float((cosine.detach().double() - expected.detach()).abs().max()) < limit
    assert relative(gradient, true) < limit


@every_provider
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(
    "shape", [(8, 256, 384, 128, 64), (8, 256, 384, None, 64), (64, 64, 256, 32, 32)], ids=str
)  # fmt: skip
def test_mix_and_drop_forward_and_backward(
    benchmark, shape, dtype, provider, mix_case, mix_truth, relative, tolerance
):  # fmt: skip
    benchmark.group = f"mix_and_drop {shape} {dtype}"
    tensors, subset = mix_case(*(shape if benchmark.enabled else (2, *shape[1:])), dtype)
    function = mix_and_drop if provider == "ours" else unfused_mix

    def step():
        out = function(*tensors, subset)
        return out, *torch.autograd.grad(out.sum(), tensors)

    found = benchmark(step)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = mix_truth(*exact, subset)
    truths = expected, *torch.autograd.grad(expected.sum(), exact)
    limit = ROUNDINGS[provider] * tolerance(dtype)
    for name, result, true in zip(
        ("out", "x", "shift", "scale", "gate", "w1", "b1", "w2", "b2"), found, truths, strict=True
    ):
        assert relative(result, true) < limit, (name, relative(result, true))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_gpu_benchmark_says_that_it_skips(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 1 and "skipped, no CUDA or ROCm device" in printed and "--device cpu" in printed
