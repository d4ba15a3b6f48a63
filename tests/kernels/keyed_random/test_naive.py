"""Philox in PyTorch: the published answers, and the properties that draws rely on."""

import pytest
import torch

from maskalign_kernels import keyed_random, runtime
from maskalign_kernels.keyed_random import naive

# Random123, the library of Philox's authors, is tested with these: key, counter, answer.
ONES = 0xFFFFFFFF
PUBLISHED = [
    (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        0x299F31D0 << 32 | 0xA4093822,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
    (ONES << 32 | ONES, [ONES] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


@pytest.mark.parametrize("key, counter, answer", PUBLISHED, ids=["zeros", "pi", "ones"])
def test_published_answers(key, counter, answer):
    words = naive.philox(key, [torch.tensor([word]) for word in counter])
    assert [int(word) for word in words] == answer


@pytest.mark.skipif(runtime.INTERPRET, reason="the CPU takes the kernel's path here")
def test_the_public_function_on_a_cpu():
    whole = keyed_random(99, 2, 5, 11, 50, normal=True)
    parts = [keyed_random(99, 2, 5, 4, 50, normal=True), keyed_random(99, 2, 9, 7, 50, normal=True)]
    assert whole.dtype == torch.float32 and torch.equal(torch.cat(parts), whole)
    assert keyed_random(99, 2, 5, 0, 50).shape == (0, 50)
    uniform = keyed_random(99, 2, 5, 40, 999)
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(float(uniform.mean()) - 0.5) < 0.01
