"""One command for all measurements on a GPU: `python -m benchmarks.gpu --help`."""
