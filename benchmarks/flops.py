"""Floating-point operations of a training step: the stack's own formula, under the name that the benchmarks use."""

from maskalign.models.flops import forward_flops, step_flops

__all__ = ["forward_flops", "step_flops"]
