"""Philox against an independent one, and the draws of a step made with it."""

import pytest
import torch

from maskalign.objective import draws
from maskalign_kernels import keyed_random
from maskalign_kernels.keyed_random import naive


def philox(key, counter):
    """Philox-4x32-10 as its paper defines it (Salmon et al., SC 2011), on Python's own integers.

    test_naive.py holds naive.py to the published answers, and a test below compares it with the kernel.
    """
    counter, key = list(counter), [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (second >> 32) ^ counter[1] ^ key[0], second & 0xFFFFFFFF,
            (first >> 32) ^ counter[3] ^ key[1], first & 0xFFFFFFFF,
        ]  # fmt: skip
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@pytest.mark.parametrize("size", [1, 37, 1030])
@pytest.mark.parametrize("key", [1, 2**62 + 12345])
def test_uniform_numbers(size, key, generator):
    first, stream = (int(torch.randint(0, 2**31 - 10, (), generator=generator)) for _ in range(2))
    found = keyed_random(key, stream, first, 3, size)
    quarter = -(-size // 4)
    columns = {0, size - 1, size // 2}
    for row in range(3):
        for column in columns:
            word = philox(key, [column % quarter, first + row, stream, 0])[column // quarter]
            # As signed words they fold at zero: 31 bits of a number below 1.
            exact = (0xFFFFFFFF - word if word >> 31 else word) / 2**31
            assert abs(float(found[row, column]) - exact) < 2e-7
    assert (found >= 0).all() and (found < 1).all()


@pytest.mark.parametrize("size", [1, 6, 37])
def test_the_naive_twin_draws_the_same_numbers(size, seed):
    key = seed << 31 | 12345
    arguments = key, seed % 1000, 2**31 - 20, 5, size
    assert torch.equal(naive.keyed_random(*arguments), keyed_random(*arguments))
    torch.testing.assert_close(naive.keyed_random(*arguments, is_normal=True), keyed_random(*arguments, normal=True))


def test_normal_numbers(generator):
    key = int(torch.randint(0, 2**62, (), generator=generator))
    x = keyed_random(key, 0, 0, 8, 8000, normal=True).double()
    tolerance = 5 / x.numel() ** 0.5
    moments = [float((x**power).mean()) for power in (1, 2, 3, 4)]
    for found, exact, spread in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(found - exact) < tolerance * spread
    below = [float((x < point).double().mean()) for point in (-2.0, -1.0, 0.0, 1.0, 2.0)]
    exact = torch.special.ndtr(torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)).tolist()
    assert all(abs(a - b) < tolerance for a, b in zip(below, exact, strict=True))
    # Neighbors in a row, in a column, and in another stream have nothing to do with each other.
    other = keyed_random(key, 1, 0, 8, 8000, normal=True).double()
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x, other), (x[:, 2000:], x[:, :-2000])):
        assert abs(float((a * b).mean())) < tolerance


def test_rows_do_not_depend_on_who_asks():
    whole = keyed_random(99, 2, 5, 11, 50, normal=True)
    assert torch.equal(
        torch.cat([keyed_random(99, 2, 5, 4, 50, normal=True), keyed_random(99, 2, 9, 7, 50, normal=True)]), whole
    )
    assert keyed_random(99, 2, 5, 0, 50).shape == (0, 50)


@pytest.fixture
def keyed(monkeypatch):
    """`draw` makes its numbers as on a GPU."""
    monkeypatch.setattr(draws, "has_keyed_numbers", lambda device: True)


@pytest.mark.parametrize("subset, parts", [("uniform", [1, 6, 1]), ("grid", [3, 5]), ("block", [0, 8])])
def test_any_split_of_the_batch_draws_the_same(keyed, parts, subset, seed):
    settings = dict(shape=(2, 4, 4), grid=(4, 4), keep=8, align=4, posterior=True, class_dim=5, subset=subset)
    whole = draws.draw(seed, 7, 3, 8, **settings)
    first, pieces = 3, []
    for count in parts:
        pieces.append(draws.draw(seed, 7, first, count, **settings))
        first += count
    for together, column in zip(whole, zip(*pieces, strict=True), strict=True):
        assert torch.equal(together, torch.cat(column))
    assert (whole.subset.diff(dim=1) > 0).all() and whole.subset.min() >= 0 and whole.subset.max() < 16
    assert not torch.equal(whole.noise, whole.posterior)


def test_seed_and_step_matter_and_recipes_share_numbers(keyed, seed):
    settings = dict(shape=(2, 4, 4), grid=(4, 4))
    base = draws.draw(seed, 3, 0, 2, keep=8, **settings)
    for other in (draws.draw(seed + 1, 3, 0, 2, keep=8, **settings), draws.draw(seed, 4, 0, 2, keep=8, **settings)):
        assert not torch.equal(base.noise, other.noise) and not torch.equal(base.time, other.time)
    full = draws.draw(seed, 3, 0, 2, keep=16, **settings)
    assert full.subset is None and torch.equal(full.time, base.time) and torch.equal(full.noise, base.noise)
    assert torch.equal(full.drop_label, base.drop_label)
