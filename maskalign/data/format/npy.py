"""Arrays in .npy form, read without trust: nothing is unpickled, nothing is allocated on a header's word."""

import io
from math import prod

import numpy as np
from numpy.lib import format as npy

from maskalign.errors import one_line


def read_header(file, max_bytes=10_000):
    """(shape, dtype, column-major?) from the start of an open .npy file, which is then at its first number.

    Args:
        file: open for reading in binary.
        max_bytes: of the header; a longer one is refused before it is parsed.

    Raises:
        ValueError and nearly any other: numpy parses a header as Python literals.
    """
    version = npy.read_magic(file)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version[0]}.{version[1]} of the format")
    return readers[version](file, max_header_size=max_bytes)


def npy_header(data):
    """(shape, dtype name) of a .npy file's bytes.

    Raises:
        ValueError: not a row-major .npy of plain numbers, or not of exactly the size that its header says.
    """
    return _parse(data)[:2]


def load_npy(data):
    """The array of a .npy file's bytes, a view of them; ValueError as from `npy_header`."""
    shape, dtype, start = _parse(data)
    return np.frombuffer(data, dtype=dtype, offset=start).reshape(shape)


def all_finite(data):
    """Whether a .npy file's bytes hold neither infinity nor NaN; ValueError as from `npy_header`."""
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
        raise ValueError("its size is not what the header says")
    return shape, dtype.name, file.tell()
