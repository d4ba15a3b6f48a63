"""The .npy arrays of a sample, read without trust: nothing is unpickled, nothing is allocated on a header's word."""

import io
from math import prod

import numpy as np
from numpy.lib import format as npy

from maskalign.errors import one_line


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
        version = npy.read_magic(file)
        read_header = npy.read_array_header_2_0 if version == (2, 0) else npy.read_array_header_1_0
        shape, column_major, dtype = read_header(file)
    except Exception as error:  # numpy parses the header as Python literals: SyntaxError, TokenError, TypeError
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
