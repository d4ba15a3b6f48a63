"""The command line: a file per command, each with one dataclass from which its options and their help come."""

from maskalign.cli.main import main

__all__ = ["main"]
