"""What recipes reach in the same time: `python -m benchmarks.convergence --help`."""
