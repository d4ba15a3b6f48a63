"""Measurements of `benchmarks.kernels`: milliseconds of a captured graph, bandwidth of a copy, peak memory.

`GPU` measures on a GPU. `HOST` has the same functions with plain calls on a CPU, for rehearsals of the same code.
"""

import contextlib
import time
from types import SimpleNamespace

import torch


def captured(run):
    """Capture `run` as a CUDA graph, which measures the work of the GPU without Python's part.

    The current stream is used and must not be the default one, because autograd runs a backward on the stream of its
    forward.
    """
    for _ in range(3):  # Compile and allocate, which is not allowed during a capture.
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def graph_ms(run):
    """Median, 20th and 80th percentile of the milliseconds of `run` as a graph, L2 cleared before each time."""
    import triton

    # A run takes microseconds, so there are a few thousand runs; most of the time is spent on clearing L2.
    return triton.testing.do_bench(captured(run), warmup=5, rep=20, quantiles=[0.5, 0.2, 0.8])


def call_ms(run):
    """Median milliseconds of plain calls, L2 cleared before each."""
    import triton

    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def copy_bandwidth(device, moved=2**31):
    """GB/s of copying on the device, `moved` bytes read and written together; by default 1 GiB is copied.

    This is the faster of the driver's copy and an elementwise kernel.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        return _copy_speed(device, moved, graph_ms)


def _copy_speed(device, moved, clock):
    source = torch.randn(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(clock(way)[0] for way in ways) / 1e6


def peak_memory(run):
    """Peak MiB allocated while `run` runs, minus the memory allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_ms(run):
    """As `graph_ms`, for five plain calls on the CPU."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        taken.append(1000 * (time.perf_counter() - start))
    return sorted(taken)[2], min(taken), max(taken)


GPU = SimpleNamespace(
    graph_ms=graph_ms, call_ms=call_ms, copy_bandwidth=copy_bandwidth, peak_memory=peak_memory,
    stream=lambda: torch.cuda.stream(torch.cuda.Stream()), name=lambda: torch.cuda.get_device_name(),
    free=lambda: torch.cuda.empty_cache(),
)  # fmt: skip


def _run_once(run):
    run()


HOST = SimpleNamespace(
    graph_ms=host_ms, call_ms=lambda run: host_ms(run)[0], peak_memory=_run_once,
    copy_bandwidth=lambda device, moved=2**22: _copy_speed(device, moved, host_ms),
    stream=contextlib.nullcontext, name=lambda: "CPU", free=lambda: None,
)  # fmt: skip
