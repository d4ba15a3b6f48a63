"""The CPU path, timed by pytest-benchmark: `pytest tests/kernels/test_benchmark_cpu.py --benchmark-enable`.

On a machine with other work, `OMP_NUM_THREADS=1` and `--benchmark-timer=time.process_time` count the processor's time.

The groups pair our CPU path with the chain as training codes write it; in a plain run each case runs once,
unmeasured.
"""

import subprocess
import sys

import pytest
import torch

from benchmarks.kernel_report import unfused_alignment, unfused_mix
from maskalign_kernels import mix_and_drop, subset_cosine_alignment

PROVIDERS = ("ours", "chain")


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("teacher", [torch.int8, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 256, 128, 768), (64, 64, 32, 320)], ids=str)
def test_alignment_forward_and_backward(benchmark, shape, dtype, teacher, provider, alignment_case):
    benchmark.group = f"alignment {shape} {dtype} {teacher}"
    s, z, subset = alignment_case(*shape, dtype, teacher)
    functions = {"ours": subset_cosine_alignment, "chain": unfused_alignment}

    def step():
        s.grad = None
        (-functions[provider](s, z, subset).mean()).backward()
        return s.grad

    assert benchmark(step).isfinite().all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 256, 128, 384, 64), (64, 64, 32, 256, 32)], ids=str)
def test_mix_and_drop_forward_and_backward(benchmark, shape, dtype, provider, generator):
    benchmark.group = f"mix_and_drop {shape} {dtype}"
    B, N, K, D, T = shape
    sizes = [(B, N, D), (B, D), (B, D), (B, D), (T, N), (T,), (N, T), (N,)]
    tensors = [(0.1 * torch.randn(size, generator=generator)).to(dtype).requires_grad_() for size in sizes]
    subset = torch.rand(B, N, generator=generator).argsort(1)[:, :K].sort(1).values
    function = mix_and_drop if provider == "ours" else unfused_mix
    gradients = benchmark(lambda: torch.autograd.grad(function(*tensors, subset).sum(), tensors))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_the_gpu_benchmark_says_that_it_skips():
    run = subprocess.run([sys.executable, "-m", "benchmarks.kernels"], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "skipped, no CUDA or ROCm device" in run.stdout, run.stderr
    assert len(run.stdout.splitlines()) == 1 and "--device cpu" in run.stdout
