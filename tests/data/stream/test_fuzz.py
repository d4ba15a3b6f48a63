"""Random damage to shards: never a crash, a hang or a wrong label, whatever the bytes."""

import os
import random
import signal

import numpy as np
import pytest

from maskalign.data import ShardStream
from maskalign.errors import RunError

MUTATIONS = 600


def flip_bit(data, draw):
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def set_byte(data, draw):
    data[draw.randrange(len(data))] = draw.choice([0, 255, 32, 47, 46, *range(48, 58)])


def in_a_header(data, draw):
    block = draw.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
    data[block + draw.randrange(345)] = draw.choice([0, 32, *range(48, 58)])


def swap_in_a_header(data, draw):
    """Tar's checksum is a sum, so it does not see this one."""
    block = draw.choice([i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"])
    one, two = block + draw.randrange(12), block + draw.randrange(345)
    data[one], data[two] = data[two], data[one]


def in_a_label(data, draw):
    blocks = [i for i in range(0, len(data) - 512, 512) if b".cls\0" in data[i : i + 100]]
    data[draw.choice(blocks) + 512] = draw.choice(range(48, 58))


def zero(data, draw):
    start = draw.randrange(len(data))
    length = min(draw.randrange(1, 2000), len(data) - start)
    data[start : start + length] = bytes(length)


def noise(data, draw):
    start = draw.randrange(len(data))
    length = min(draw.randrange(1, 3000), len(data) - start)
    data[start : start + length] = draw.randbytes(length)


def cut(data, draw):
    del data[draw.randrange(len(data)) :]


def drop(data, draw):
    start = draw.randrange(len(data))
    unit = draw.choice([1, 512])
    del data[start // unit * unit : start // unit * unit + unit * draw.randrange(1, 8)]


def insert(data, draw):
    start, unit = draw.randrange(len(data)), draw.choice([1, 512])
    data[start // unit * unit : start // unit * unit] = draw.randbytes(unit * draw.randrange(1, 4))


def repeat(data, draw):
    start = draw.randrange(len(data)) // 512 * 512
    place = draw.randrange(len(data)) // 512 * 512
    data[place:place] = data[start : start + 512 * draw.randrange(1, 9)]


def move(data, draw):
    """Blocks change places: the data of one member may come to stand behind the header of another."""
    one, two = (draw.randrange(len(data) // 512) * 512 for _ in range(2))
    data[one : one + 512], data[two : two + 512] = data[two : two + 512], data[one : one + 512]


DAMAGE = [
    flip_bit, set_byte, in_a_header, swap_in_a_header, in_a_label,
    zero, noise, cut, drop, insert, repeat, move,
]  # fmt: skip


def mutate(original, draw):
    data, names = bytearray(original), []
    for _ in range(draw.choice([1, 1, 1, 2, 5])):
        if len(data) >= 2048:
            damage = draw.choice(DAMAGE)
            names.append(damage.__name__)
            try:
                damage(data, draw)
            except IndexError:  # nothing left of the kind that it damages
                continue
    return bytes(data), names


@pytest.fixture
def time_limit():
    def late(*_):
        raise TimeoutError("hangs")

    before = signal.signal(signal.SIGALRM, late)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("image", ["png", "jpg"])
def test_mutated_shards(make_shards, time_limit, seed, checksums, image):
    draw = random.Random(seed)
    path, truth = make_shards([6, 3], checksums=checksums, image=image, latent=True, hflip=True)
    target = os.path.join(path, "shard-000000.tar")
    intact = {key for key, entry in truth.items() if entry["shard"] == 1}
    with open(target, "rb") as file:
        original = file.read()
    pictures = {key: batch["image"][i] for batch in ShardStream(path, 3, epochs=1, hflip=False)
                for i, key in enumerate(batch["key"])}  # fmt: skip
    saved = 0
    for number in range(MUTATIONS // 4):
        damaged, names = mutate(original, draw)
        with open(target, "wb") as file:
            file.write(damaged)
        where = f"mutation {number}: {names}"
        time_limit(20)
        stream, seen = ShardStream(path, 3, epochs=1, max_bad_fraction=1.0, hflip=False), []
        try:
            for batch in stream:
                for i, key in enumerate(batch["key"]):
                    assert key in truth, where
                    assert batch["label"][i] == truth[key]["label"], where
                    assert np.array_equal(batch["lite:2"][i], truth[key]["lite:2"]), where
                    assert np.array_equal(batch["moments"][i], truth[key]["moments"]), where
                    assert bool((batch["image"][i] == pictures[key]).all()), where
                    seen.append(key)
        except RunError as error:
            raise AssertionError(f"{where}: {error}") from None
        assert len(seen) == len(set(seen)) and set(seen) >= intact, where
        saved += len(seen) - len(intact)
        assert len(seen) + len(stream.bad_samples) == len(truth), where
    time_limit(0)
    print(f"{saved / (MUTATIONS // 4):.2f} of 6 samples per damaged shard were still used")
    assert saved / (MUTATIONS // 4) > 3 or not checksums
