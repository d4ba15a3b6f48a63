"""Time and memory of both operations: `python -m benchmarks.kernels --help`."""
