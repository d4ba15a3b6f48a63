"""Images on their way into a data set: bounded decoding, ADM's centre crop or a plain resize, encoding.

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


def decode_image(data, max_pixels=MAX_PIXELS):
    """Decode one image to RGB, reading its header first so that a bomb is refused before it unfolds.

    Args:
        data: the file's bytes.
        max_pixels: an image with more pixels is refused.

    Returns:
        A loaded PIL image of mode RGB. Transparent parts are laid on white; an animation gives its first frame.

    Raises:
        BadImage: not one of FORMATS, cut short, or too large.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, as thousands of ImageNet's files have
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise BadImage(f"{width}x{height} pixels, over the limit of {max_pixels:,}")
            return to_rgb(image)
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"over the limit of {max_pixels:,} pixels") from None
    except MemoryError:
        raise BadImage("needs more memory than there is") from None
    except Exception as error:  # a damaged file makes Pillow's plugins raise nearly anything
        message = re.sub(r" ?<_io.BytesIO object[^>]*>", "", one_line(error))
        raise BadImage(message[:200] or type(error).__name__) from None


def to_rgb(image):
    """The image in mode RGB, 8 bits per channel, transparent parts on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode.startswith("I"):  # 16 bits per channel: keep the upper eight
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray((values.clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def adm_crop(image, size):
    """ADM's centre crop (guided-diffusion, image_datasets.center_crop_arr), as REPA and SiT use it.

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
