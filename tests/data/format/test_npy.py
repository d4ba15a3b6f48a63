"""Arrays in .npy form are read without a copy, and a header's word alone allocates nothing."""

import io

import numpy as np
import pytest

from maskalign.data.format.npy import load_npy, npy_header


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32", "uint8", "int64"])
def test_arrays_are_read_without_a_copy(dtype, seed):
    array = np.random.default_rng(seed).integers(0, 100, (3, 5, 2)).astype(dtype)
    data = npy(array)
    assert npy_header(data) == ((3, 5, 2), dtype)
    assert np.array_equal(load_npy(data), array) and not load_npy(data).flags.owndata


def test_a_header_cannot_claim_memory():
    data = npy(np.zeros((4, 4), np.int8)).replace(b"(4, 4)", b"(10**9, 4)"[:6])
    with pytest.raises(ValueError):
        load_npy(data)
    huge = bytearray(npy(np.zeros((1, 1), np.int8)))
    at = huge.index(b"(1, 1), }   ")
    huge[at : at + 30] = b"(999999999999999, 9999999), } "
    with pytest.raises(ValueError, match="size differs"):
        load_npy(bytes(huge))
