"""How `benchmarks.kernels` measures: milliseconds of a captured graph, bandwidth of a copy, peak memory.

`GPU` measures on a GPU; `HOST` has the same functions with plain calls on a CPU, where the same code is rehearsed.
"""

import contextlib
import time
from types import SimpleNamespace

import torch


def captured(run):
    """`run` as one launch of a CUDA graph: the work of the GPU without Python's part.

    On the current stream, which must not be the default one: autograd runs a backward where its forward ran.
    """
    for _ in range(3):  # Compiles and allocates what is left to, which a capture may not.
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        run()
    return graph.replay


def graph_ms(run):
    """Median, 20th and 80th percentile of the milliseconds of `run` as a graph, L2 cleared before each time."""
    import triton

    # Microseconds a time: a few thousand times, most of which goes into clearing L2.
    return triton.testing.do_bench(captured(run), warmup=5, rep=20, quantiles=[0.5, 0.2, 0.8])


def call_ms(run):
    """Median milliseconds of plain calls, L2 cleared before each."""
    import triton

    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median")


def copy_bandwidth(device, moved=2**31):
    """GB/s of copying on the device, `moved` bytes read and written together; by default 1 GiB is copied.

    The better of the driver's copy and of an elementwise kernel, whichever this GPU is faster at.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        return _copy_speed(device, moved, graph_ms)


def _copy_speed(device, moved, clock):
    source = torch.randn(max(1, moved // 8), device=device)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(clock(way)[0] for way in ways) / 1e6


def peak_memory(run):
    """MiB allocated at most while `run` runs, over what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_ms(run):
    """As `graph_ms`, of five plain calls on the CPU."""
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
