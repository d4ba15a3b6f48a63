"""The sizes of SiT by name (SiT, Ma et al. 2024, table 1; REPA uses the same), readable without torch."""

from typing import Dict

from maskalign.errors import UsageError

# name: depth, width, heads, and REPA's default alignment depth (counted from 1).
# REPA has no runnable S; we align it where it aligns B, which has the same depth.
SIZES = {
    "S": dict(depth=12, width=384, heads=6, align_depth=4),
    "B": dict(depth=12, width=768, heads=12, align_depth=4),
    "L": dict(depth=24, width=1024, heads=16, align_depth=8),
    "XL": dict(depth=28, width=1152, heads=16, align_depth=8),
}
PATCH_SIZES = (2, 4, 8)
PRESETS = [f"SiT-{size}/{patch}" for size in SIZES for patch in PATCH_SIZES]


def preset_sizes(name: str) -> Dict[str, int]:
    """Sizes of a preset such as `SiT-B/2`.

    Returns:
        dict with depth, width, heads, align_depth, patch_size.

    Raises:
        UsageError: for a name that is not in `PRESETS`.
    """
    if name not in PRESETS:
        raise UsageError(f"model.preset: there is no preset {name!r}; choose one of {', '.join(PRESETS)}")
    size, patch = name.removeprefix("SiT-").split("/")
    return {**SIZES[size], "patch_size": int(patch)}
