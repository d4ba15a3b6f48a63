"""The font of the sheets of pictures."""

from importlib.util import find_spec
from pathlib import Path

from PIL import ImageFont


def load_font(size):
    """DejaVu Sans, which matplotlib ships: Latin with all its accents, Greek, Cyrillic; Pillow's own without it.

    Args:
        size: in pixels.

    Returns:
        Pillow's font.
    """
    package = find_spec("matplotlib")  # found, not imported: that takes a second
    if package is not None:
        path = Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if path.is_file():
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)
