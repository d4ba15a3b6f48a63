"""Images on their way into a data set: bounded decoding, ADM's center crop or a plain resize, encoding.

Pillow and numpy, no torch.
"""

import io
import re
import warnings

import numpy as np
from PIL import Image

from maskalign.errors import one_line

# The formats that a Pillow plugin decodes in memory. Others are refused: EPS, for one, starts Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
ENDINGS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm")
MAX_PIXELS = 64_000_000
MAX_BYTES = 256 * 2**20


class BadImage(ValueError):
    """Bytes that are not a usable image; the message says in a few words why."""


def decode_image(data, max_pixels=MAX_PIXELS, exif="ignore"):
    """Decode one image to RGB, reading its header first so that a bomb is refused before it unfolds.

    Args:
        data: the file's bytes.
        max_pixels: an image with more pixels is refused.
        exif: "apply" turns a photo as its camera says it was held, which viewers do; "ignore" takes the pixels as they
            are stored, which ADM and REPA do.

    Returns:
        A loaded PIL image of mode RGB. Transparent parts are laid on white; an animation gives its first frame.

    Raises:
        BadImage: not one of FORMATS, cut short, too large, or of numbers whose range is unknown (see `to_rgb`).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, as thousands of ImageNet's files have
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
        raise BadImage("needs more memory than there is") from None
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
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
    """The image turned as EXIF says: that of `original`, or its own. Damaged EXIF says nothing."""
    try:
        turn = TURNS.get((original or image).getexif().get(ORIENTATION))
    except Exception:  # Pillow's parsers raise nearly anything, and the pixels are fine without it
        return image
    return image if turn is None else image.transpose(turn)


def to_rgb(image, bits=None, deep=False):
    """The image in mode RGB, 8 bits per channel, transparent parts on white.

    Args:
        image: of any mode.
        bits: how many bits large gray numbers have, where the file says so beyond doubt; else their range tells.
        deep: the file has 16 bits per channel of color, of which Pillow keeps the upper eight.

    Raises:
        BadImage: numbers of 16 bits that may as well be dark pictures as fewer bits in large numbers, or no integers.
    """
    if image.mode == "RGB" and "transparency" not in image.info and not deep:
        image.load()
        return image
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown; give 8-bit pictures")
    if image.mode.startswith("I"):
        return _from_integers(np.asarray(image).astype(np.int64), bits)
    if deep:  # of 12-bit numbers the upper eight leave four, all but black
        bands = image.getbands()
        most = max(high for band, (_, high) in zip(bands, _ranges(image), strict=True) if band not in ("A", "a"))
        if most < 64:
            raise BadImage(_untold(most * 256 + 255))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _ranges(image):
    ranges = image.getextrema()
    return ranges if isinstance(ranges[0], tuple) else (ranges,)


def _from_integers(values, bits):
    """An RGB image of gray values of more than 8 bits.

    Where the file does not say how many bits they have, values over 16,383 can only be of 16, and those that end
    between 2,048 and 4,095 fill 12, as scanners and cameras deliver them. In between lie 14 bits and dark pictures.
    """
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65535:
        raise BadImage(f"pixels from {low:,} to {high:,}, no brightness of 8 or 16 bits; convert it to 8 bits")
    if bits is None:
        bits = 16 if high > 16383 or high == 0 else 12 if 2048 <= high <= 4095 else None
    if bits is None:
        raise BadImage(_untold(high))
    return Image.fromarray((values >> (bits - 8)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _untold(most):
    return f"16-bit pixels up to {most:,} of 65,535: a dark picture, or one of fewer bits; convert it to 8 bits"


def _declared(image, data):
    """What a file's header says of large numbers: (bits of gray ones or None, whether colors have 16 bits)."""
    gray = image.mode.startswith(("I", "F"))
    if image.format == "PPM" and gray:
        return 16, False  # Pillow has scaled them from the largest number that the header names
    if image.format == "TIFF":
        depths = image.tag_v2.get(258, (8,))
        depths = depths if isinstance(depths, tuple) else (depths,)
        if gray:
            return (int(depths[0]) if 8 < depths[0] < 16 else None), False
        return None, any(depth > 8 for depth in depths)
    return None, image.format == "PNG" and not gray and data[24:25] == b"\x10"


def is_as_stored(data, size, image_format):
    """Whether a file's bytes, which can be decoded, are a stored image as they are: format, size, 8-bit RGB."""
    if not isinstance(data, bytes):
        return False
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        kind = {"JPEG": "jpg"}.get(image.format, image.format.lower())
        plain = image.mode == "RGB" and "transparency" not in image.info and _declared(image, data) == (None, False)
        turned = image.getexif().get(ORIENTATION, 1) != 1
        return kind == image_format and image.size == (size, size) and plain and not turned


def adm_crop(image, size):
    """ADM's center crop (guided-diffusion, image_datasets.center_crop_arr), as REPA and SiT use it.

    The image is halved by area averaging while its shorter side is at least twice `size`, resized bicubically
    so that the shorter side is `size`, and the middle square is cut out.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def plain_resize(image, size):
    """The whole image resized bicubically (antialiased) to a square, whatever its aspect ratio."""
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
    # A clean copy: what Pillow would take over from the source (gamma, profiles, comments) stays out.
    plain = Image.frombytes("RGB", image.size, image.tobytes())
    plain.save(buffer, **settings[image_format])
    return buffer.getvalue()
