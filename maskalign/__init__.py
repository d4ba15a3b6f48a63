"""MaskAlign: diffusion transformers trained with representation alignment on random token subsets."""

__version__ = "0.2.0"
