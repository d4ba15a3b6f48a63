"""Compare the results of recipes after the same training time: `python -m benchmarks.convergence --help`."""
