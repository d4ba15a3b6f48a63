import sys

from benchmarks.convergence.command import command

sys.exit(command())
