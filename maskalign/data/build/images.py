"""Decode, crop and encode images for a data set: size-limited decoding, ADM's center crop or a plain resize, encoding.

Uses Pillow and numpy; imports no torch.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image

from maskalign.errors import one_line

# The formats that a Pillow plugin decodes in memory. Others are rejected: EPS, for example, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20


class BadImage(ValueError):
    """Raised for bytes that are not a usable image, with a short reason."""


def decode_image(data, max_pixels=MAX_PIXELS, exif="ignore"):
    """Decode one image to RGB. Its header is read first, so that a decompression bomb is rejected before it is decoded.

    Args:
        data: the file's bytes.
        max_pixels: an image with more pixels is rejected.
        exif: "apply" rotates a photo according to its EXIF orientation, as viewers do; "ignore" uses the pixels as
            stored, as ADM and REPA do.

    Returns:
        A loaded PIL image of mode RGB. Transparent parts become white; of an animation, this is the first frame.

    Raises:
        BadImage: not one of FORMATS, truncated, too large, or with pixels of an unknown range (see `to_rgb`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid metadata, which thousands of ImageNet's files have
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width}x{height} pixels, over the limit of {max_pixels:,}")
            colors = to_rgb(image, *_declared(image, data))
            return upright(colors, image) if exif == "apply" else colors
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"over the limit of {max_pixels:,} pixels") from None
    except MemoryError:
        raise BadImage("needs more memory than available") from None
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly any error
        message = re.sub(r" ?<_io.BytesIO object[^>]*>", "", one_line(error))
        raise BadImage(message[:200] or type(error).__name__) from None


ORIENTATION = 0x0112  # of EXIF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def upright(image, original=None):
    """The image rotated by the EXIF orientation of `original`, or its own. Damaged EXIF data is ignored."""
    try:
        turn = TURNS.get((original or image).getexif().get(ORIENTATION))
    except Exception:  # Pillow's parsers raise nearly any error for damaged EXIF; the pixels are valid nevertheless
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image, bits=None, deep=False):
    """Convert an image to mode RGB, 8 bits per channel, with transparent parts on white.

    Args:
        image: a PIL image of any mode.
        bits: number of bits of gray pixels above 8 bits, where the file states it; None to derive it from their range.
        deep: whether the file has 16 bits per color channel, of which Pillow keeps the upper eight.

    Raises:
        BadImage: pixels of 16 bits that are either a dark picture or have fewer significant bits, or pixels that are
            not integers.
    """
    if image.mode == "RGB" and "transparency" not in image.info and not deep:
        image.load()
        return image
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; give 8-bit pictures")
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image).astype(np.int64), bits)
    if deep:  # 12-bit pixels keep only four of their bits in the upper eight, and look almost black
        bands = image.getbands()
        most = max(high for band, (_, high) in zip(bands, _ranges(image), strict=True) if band not in ("A", "a"))
        if most < 64:
            raise BadImage(_unknown_range(most * 256 + 255))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _ranges(image):
    ranges = image.getextrema()
    return ranges if isinstance(ranges[0], tuple) else (ranges,)


def _from_integers(values, bits):
    """An RGB image of gray values of more than 8 bits.

    Where the file does not state the number of bits, a maximum above 16,383 means 16 bits, and a maximum between 2,048
    and 4,095 means 12 bits, as scanners and cameras write them. Other ranges are ambiguous (14 bits, or a dark picture)
    and raise BadImage.
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65535:
        raise BadImage(f"pixels from {low:,} to {high:,}, outside the range of 16 bits; convert it to 8 bits")
    if bits is None:
        bits = 16 if high > 16383 or high == 0 else 12 if 2048 <= high <= 4095 else None
    if bits is None:
        raise BadImage(_unknown_range(high))
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _unknown_range(most):
    return f"16-bit pixels up to {most:,} of 65,535: a dark picture, or one of fewer bits; convert it to 8 bits"


def _declared(image, data):
    """The depth in a file's header: (bits of gray pixels above 8 bits or None, whether colors have 16 bits)."""
    gray = image.mode.startswith(("I", "F"))
    if image.format == "PPM" and gray:
        return 16, False  # Pillow has scaled the pixels, with the maximum in the header
    if image.format == "TIFF":
        depths = image.tag_v2.get(258, (8,))
        depths = depths if isinstance(depths, tuple) else (depths,)
        if gray:
            return (int(depths[0]) if 8 < depths[0] < 16 else None), False
        return None, any(depth > 8 for depth in depths)
    return None, image.format == "PNG" and not gray and data[24:25] == b"\x10"


def is_as_stored(data, size, image_format):
    """Whether a valid image file can be stored unchanged: the right format and size, 8-bit RGB, upright."""
    if not isinstance(data, bytes):
        return False
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = {"JPEG": "jpg"}.get(image.format, image.format.lower())
        plain = image.mode == "RGB" and "transparency" not in image.info and _declared(image, data) == (None, False)
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return kind == image_format and image.size == (size, size) and plain and not turned


def adm_crop(image, size):
    """ADM's center crop (guided-diffusion, image_datasets.center_crop_arr), as REPA and SiT use it.

    The image is halved by area averaging while its shorter side is at least twice `size`. It is then resized
    bicubically so that the shorter side is `size`, and the central square is cropped.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def plain_resize(image, size):
    """Resize the whole image bicubically (antialiased) to a square, without keeping its aspect ratio."""
    return image.resize((size, size), Image.Resampling.BICUBIC)


PREPARE = {"adm": adm_crop, "resize": plain_resize}


def encode_image(image, image_format):
    """Bytes of an RGB image as "png", "webp" (both lossless) or "jpg" (quality 95, no chroma subsampling)."""
    settings = {
        "png": {"format": "PNG", "compress_level": 6},
        "webp": {"format": "WEBP", "lossless": True, "quality": 50, "method": 3},
        "jpg": {"format": "JPEG", "quality": 95, "subsampling": 0},
    }
    buffer = io.BytesIO()
    # A copy without metadata, because Pillow would copy gamma, profiles and comments from the source.
    plain = Image.frombytes("RGB", image.size, image.tobytes())
    plain.save(buffer, **settings[image_format])
    return buffer.getvalue()
