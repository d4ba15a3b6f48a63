"""Decode the bytes of a member to a label, an array or an image, with bounded memory and without unpickling.

Only these formats are decoded: ASCII integers (.cls), numpy's .npy with a plain dtype, PNG, JPEG and WebP. Each
function raises BadSample with the reason.
"""

import io
import warnings
from functools import lru_cache

import numpy as np
from PIL import Image

from maskalign.data.format.npy import read_header

MAX_NPY_HEADER = 4096
MAX_IMAGE_BYTES = 64 * 2**20


class BadSample(Exception):
    """Raised for a sample that cannot be used, with the reason."""


def decode_label(data, num_classes):
    """The class in [0, num_classes) from the bytes of a .cls member."""
    text = bytes(data).strip()
    if not text.isdigit() or len(text) > 9:
        raise BadSample(f"label {text[:20]!r} is not an integer")
    label = int(text)
    if label >= num_classes:
        raise BadSample(f"label {label} is out of range, there are {num_classes} classes")
    return label


@lru_cache(maxsize=256)
def array_of_header(header):
    """(dtype string, shape) from the bytes of a .npy file before its data; raises BadSample if they are invalid."""
    file = io.BytesIO(header)
    try:
        shape, fortran, dtype = read_header(file, MAX_NPY_HEADER)
    except Exception as error:  # numpy's parser raises many types of errors for invalid bytes
        raise BadSample(f"no valid .npy header ({type(error).__name__})") from None
    if dtype.hasobject:
        raise BadSample("an array of Python objects, which are not unpickled")
    if fortran and len(shape) > 1:
        raise BadSample("an array in Fortran order")
    if file.tell() != len(header):
        raise BadSample(f"an array of shape {shape} and dtype {dtype}, which do not match its bytes")
    return dtype.str, shape


def decode_stored_image(data, resolution):
    """Decode an image to an array (resolution, resolution, 3) uint8; raises BadSample if it has another size.

    The size is checked before any pixel is decoded, so only the header of a 100-megapixel image is read.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size check below reports it
        try:
            with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
                if image.size != (resolution, resolution):
                    width, height = image.size
                    raise BadSample(f"image of {width} x {height} pixels, the manifest says {resolution}")
                pixels = (image if image.mode == "RGB" else image.convert("RGB")).tobytes()
        except BadSample:
            raise
        except Exception as error:  # decoders raise many types on damaged bytes
            raise BadSample(f"not a readable image ({type(error).__name__}: {str(error)[:80]})") from None
    return np.frombuffer(pixels, np.uint8).reshape(resolution, resolution, 3)
