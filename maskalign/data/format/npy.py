"""Read .npy arrays from untrusted data: nothing is unpickled, and no memory is allocated by what a header states."""

import io
from math import prod

import numpy as np
from numpy.lib import format as npy

from maskalign.errors import one_line


def read_header(file, max_bytes=10_000):
    """Read the header of an open .npy file, and leave the file at its first number.

    Args:
        file: file object, open for binary reading.
        max_bytes: the maximum size of the header; a longer one is rejected before it is parsed.

    Returns:
        (shape, whether the array is column-major, dtype).

    Raises:
        ValueError: the header is invalid. Other errors are possible too, because numpy parses it as a Python literal.
    """
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    return readers[version](file, max_header_size=max_bytes)


def npy_header(data):
    """(shape, dtype name) of a .npy file's bytes.

    Raises:
        ValueError: not a row-major .npy of numbers, or its size differs from that in its header.
    """
    return _parse(data)[:2]


def load_npy(data):
    """The array in a .npy file's bytes, as a view of them; raises ValueError as `npy_header`."""
    shape, dtype, start = _parse(data)
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)


def all_finite(data):
    """Whether the array in a .npy file's bytes has neither infinity nor NaN; raises ValueError as `npy_header`."""
    return bool(np.isfinite(load_npy(data)).all())


def _parse(data):
    file = io.BytesIO(data)
    try:
        shape, column_major, dtype = read_header(file)
    except Exception as error:  # SyntaxError, TokenError, TypeError ...
        raise ValueError(one_line(error)[:100]) from None
    if min(shape, default=0) < 0:
        raise ValueError(f"has the shape {shape}")
    if dtype.kind not in "iufb":
        raise ValueError(f"holds {dtype}, not numbers")
    if column_major and len(shape) > 1:
        raise ValueError("is column-major")
    if len(data) - file.tell() != prod(shape) * dtype.itemsize:
        raise ValueError("its size differs from that in its header")
    return shape, dtype.name, file.tell()
