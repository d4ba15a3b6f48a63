"""Philox-4x32-10 as its paper defines it, in PyTorch's int64 arithmetic. This is also the path for CPU tensors."""

import math

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox(key, counter):
    """Four words (int64 tensors in [0, 2^32)) from a 64-bit key and a counter of four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32
    for _ in range(10):
        first, second = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2  # modulo 2^64: int64 wraps
        c0, c1, c2, c3 = (second >> 32 & WORD) ^ c1 ^ k0, second & WORD, (first >> 32 & WORD) ^ c3 ^ k1, first & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def uniform(words):
    """float32 in [0, 1) from 31 bits of each word: a word with its sign bit set is complemented, as Triton does it."""
    return torch.where(words > WORD >> 1, WORD - words, words).float() * 4.6566127342e-10


def normal(a, b):
    """Two standard normal numbers from two uniform ones, by the Box-Muller transform."""
    radius, angle = (-2 * a.clamp_min(1e-7).log()).sqrt(), 2 * math.pi * b
    return radius * angle.cos(), radius * angle.sin()


def keyed_random(key, stream, first, rows, size, *, is_normal=False, device=None):
    """Arguments and result as in operations.py. The four words of a hash are stored a quarter of the row apart."""
    quarter = -(-size // 4)
    column = torch.arange(quarter, device=device).expand(rows, quarter)
    row = torch.arange(first, first + rows, device=device).unsqueeze(1).expand(rows, quarter)
    zero = torch.zeros_like(column)
    a, b, c, d = map(uniform, philox(key, (column, row, zero + stream, zero)))
    if is_normal:
        (a, b), (c, d) = normal(a, b), normal(c, d)
    return torch.cat((a, b, c, d), dim=1)[:, :size].contiguous()
