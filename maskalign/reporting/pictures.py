"""Images as `data:` URIs. They are decoded and encoded again, so that only the pixels of a file get into a page."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

# The page shows images at half this size, so that they are sharp on displays of high density.
LONGEST_SIDE = 1600
QUALITY = 90


@dataclass(frozen=True)
class Picture:
    """An image in a page. uri: a data: URI; width, height: in pixels."""

    uri: str
    width: int
    height: int


def read_picture(path):
    """Read a PNG (or another format of Pillow) as a `Picture` in lossless WebP, or in lossy WebP if this halves it.

    Raises:
        OSError, ValueError, SyntaxError: the file is not an image, or it is damaged or too large.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    exact, lossy = _webp(image, lossless=True), _webp(image, quality=QUALITY)
    data = lossy if 2 * len(lossy) < len(exact) else exact
    return Picture(f"data:image/webp;base64,{base64.b64encode(data).decode()}", *image.size)


def _webp(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=4, **options)
    return buffer.getvalue()
