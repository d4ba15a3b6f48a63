"""Time and memory of the operations: `python -m benchmarks.kernels --help`."""
