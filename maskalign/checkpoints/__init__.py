"""Checkpoints on disk: reading runs and weight files, and conversion from and to the layouts of REPA, REG and SiT."""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "from_repa": "conversion",
        "to_repa": "conversion",
        "from_reg": "conversion",
        "to_reg": "conversion",
        "read_file": "weight_files",
        "load": "loading",
        "load_model": "loading",
        "load_weights": "loading",
        "Loaded": "loading",
        "build_model": "build",
        "convert": "command",
    },
)
