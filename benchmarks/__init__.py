"""Measurements: each module prints a table and writes CSV and PNG; run one with `python -m benchmarks.NAME --help`."""
