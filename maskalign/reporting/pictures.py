"""Pictures as `data:` URIs: decoded and encoded again, so that nothing but pixels of a file gets into a page."""

import base64
import io
from dataclasses import dataclass

from PIL import Image

# Shown at half of that on a page, and sharp on a display of high density.
LONGEST_SIDE = 1600
QUALITY = 90


@dataclass(frozen=True)
class Picture:
    """A picture to be put into a page. uri: a data: URI; width, height: in pixels."""

    uri: str
    width: int
    height: int


def read_picture(path):
    """A PNG (or anything that Pillow reads) as a `Picture`: lossless WebP or, where that is smaller by half, lossy.

    Raises:
        OSError, ValueError, SyntaxError: it is no picture, or a damaged or huge one.
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
