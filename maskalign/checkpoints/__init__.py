"""Checkpoints on disk: reading runs and weight files, and conversion from and to the layouts of REPA, REG and SiT."""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.checkpoints.conversion import from_reg as from_reg
    from maskalign.checkpoints.conversion import from_repa as from_repa
    from maskalign.checkpoints.conversion import to_reg as to_reg
    from maskalign.checkpoints.conversion import to_repa as to_repa
    from maskalign.checkpoints.loading import load_model as load_model

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
        "ModelInfo": "spec",
        "ModelSpec": "spec",
        "convert": "command",
    },
)
