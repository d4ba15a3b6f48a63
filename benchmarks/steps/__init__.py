"""Throughput and memory of a training step: `python -m benchmarks.steps --help`."""
