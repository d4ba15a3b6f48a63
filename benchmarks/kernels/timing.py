"""How `benchmarks.kernels` measures on a GPU: milliseconds of a captured graph, bandwidth of a copy, peak memory."""

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


def copy_bandwidth(device, moved=2**31):
    """GB/s of copying on the device, `moved` bytes read and written together; by default 1 GiB is copied.

    The better of the driver's copy and of an elementwise kernel, whichever this GPU is faster at.
    """
    with torch.cuda.stream(torch.cuda.Stream()):
        source = torch.randn(moved // 8, device=device)
        target = torch.empty_like(source)
        ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
        return 2 * source.nbytes / min(graph_ms(way)[0] for way in ways) / 1e6


def peak_memory(run):
    """MiB allocated at most while `run` runs, over what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20
