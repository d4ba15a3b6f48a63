"""CUDA graphs on a CPU: torch.cuda as far as graphs.py uses it, and captured steps that compute again when replayed."""

import contextlib

import torch

from maskalign.training import graphs


class Stream:
    """Everything runs in one order here."""

    def __init__(self, device=None):
        """Of any device."""

    def wait_stream(self, other):
        """What came before is done."""


class PretendedStep(graphs.CapturedStep):
    """Reads its inputs from where they are copied to, and writes results and gradients to the same places each time.

    As a real capture it computes nothing when it is made: the results are there after a replay.
    """

    captures, replays = 0, 0  # so far

    def _record(self, compute, stream):
        type(self).captures += 1
        self.compute = compute
        return ()

    def _launch(self):
        type(self).replays += 1
        self.results = self.compute()
        self.gradients = [p.grad for p in self.parameters]


def pretend(patch):
    """Make steps on a CPU "captured" ones; patch(owner, name, value) sets an attribute."""
    PretendedStep.captures = PretendedStep.replays = 0
    for name, value in {
        "Stream": Stream,
        "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }.items():
        patch(torch.cuda, name, value)
    patch(graphs, "captures", lambda config, placement: config.training.cuda_graph)
    patch(graphs, "CapturedStep", PretendedStep)
    return PretendedStep
