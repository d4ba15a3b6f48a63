"""The pure functions behind the stream's order: stable for ever, exact, and even."""

import random
from collections import Counter

import numpy as np
import pytest

from maskalign.data.stream.mixture import Mixture, cycle, parse_paths
from maskalign.data.stream.order import Cursor, Order, default_group, default_streams, permutation
from maskalign.errors import UsageError


def splitmix64(state):
    """Next output of the published generator (Vigna's C code), for comparison."""
    mask = 2**64 - 1
    z = (state + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_order_is_the_one_that_checkpoints_rely_on():
    key = 0
    for value in (7, 0, 3):
        key = splitmix64((key + value) % 2**64)
    gamma = 0x9E3779B97F4A7C15
    draws = [splitmix64((key + i * gamma) % 2**64) for i in range(50)]
    assert permutation(50, 7, 0, 3).tolist() == sorted(range(50), key=draws.__getitem__)
    assert permutation(10, 1, 2).tolist() == GOLDEN
    assert permutation(0, 1).tolist() == [] and permutation(1, 1).tolist() == [0]


GOLDEN = [2, 9, 8, 7, 3, 1, 5, 6, 0, 4]


def test_permutations_are_fair():
    first = Counter(int(permutation(5, seed, 1)[0]) for seed in range(2000))
    assert all(330 < first[i] < 470 for i in range(5))
    assert not np.array_equal(permutation(100, -1), permutation(100, 1))


def test_every_epoch_is_dealt_exactly(seed):
    draw = random.Random(seed)
    for _ in range(40):
        counts = [draw.choice([0, 1, draw.randrange(30)]) for _ in range(draw.randrange(1, 12))]
        if not sum(counts):
            continue
        streams, group = draw.choice([1, 2, 3, 8, 50]), draw.randrange(1, 5)
        order = Order(counts, streams, group, seed=draw.randrange(-5, 5))
        cursors = [Cursor(order, stream) for stream in range(streams)]
        for epoch in range(3):
            drawn = Counter()
            for g in range(epoch * order.total, (epoch + 1) * order.total):
                where, shard, sample = cursors[g % streams].peek()
                assert where == epoch
                drawn[shard, sample] += 1
                cursors[g % streams].advance()
            assert drawn == Counter((s, i) for s, count in enumerate(counts) for i in range(count))


def test_a_cursor_starts_anywhere_and_holds_no_finished_shard(seed):
    draw = random.Random(seed)
    order = Order([draw.randrange(1, 9) for _ in range(30)], streams=3, group=2, seed=seed)
    for stream in range(3):
        cursor, walk = Cursor(order, stream), []
        for _ in range(3 * order.total // 3):
            walk.append(cursor.peek())
            cursor.advance()
        for position in [0, *draw.sample(range(len(walk) - 40), 20)]:
            held = set()

            def watch(released, now, held=held):
                held.difference_update(released)
                held.update(now)

            later = Cursor(order, stream, position, watch)
            for step in walk[position : position + 40]:
                assert later.peek() == step
                assert step[1] in held
                assert held <= {shard for _, shard, _ in walk[position:]} or position > len(walk) - 60
                later.advance()


def test_default_number_of_streams():
    for batch_size in range(1, 2000):
        streams = default_streams(batch_size)
        assert batch_size % streams == 0 and streams <= 64
        for ranks in (2, 4, 8, 16, 32, 64):
            assert streams % ranks == 0 or batch_size % ranks, "ranks own whole streams"
    assert default_streams(256) == default_streams(4096) == 64
    assert (default_group(1), default_group(8), default_group(64)) == (32, 4, 2)


@pytest.mark.parametrize(
    "weights", [[1], [1, 1], [0.7, 0.3], [3, 2, 1], [0.1, 0.2, 0.3, 0.4], [1e-3, 1], [1 / 3, 2 / 3]]
)
def test_cycles_have_exact_even_shares(weights):
    pattern = cycle(weights)
    counts = Counter()
    for n, choice in enumerate(pattern, 1):
        counts[choice] += 1
        for i, weight in enumerate(weights):
            assert abs(counts[i] - n * weight / sum(weights)) < 1.01
    for i, weight in enumerate(weights):
        assert abs(counts[i] / len(pattern) - weight / sum(weights)) < 1e-5


@pytest.mark.parametrize("streams", [1, 2, 4, 10, 64])
def test_every_stream_and_every_row_of_a_mixture_keeps_the_shares(streams):
    mixture = Mixture([0.5, 0.3, 0.2], streams)
    for stream in range(streams):
        assert Counter(mixture(stream, n) for n in range(10)) == {0: 5, 1: 3, 2: 2}
    for n in range(20):
        row = Counter(mixture(stream, n) for stream in range(streams))
        assert all(abs(row[i] - streams * w) < 2 for i, w in enumerate([0.5, 0.3, 0.2]))


def test_paths_and_weights():
    assert parse_paths("a") == [("a", 1)]
    assert parse_paths(["a", ("b", 2)]) == [("a", 1), ("b", 2)]
    assert parse_paths({"a": 0.5}) == [("a", 0.5)]
    for wrong in ([], {"a": 0}, {"a": -1}, {"a": "x"}, {"a": True}, {"a": float("nan")}, [("a", 1, 2)]):
        with pytest.raises(UsageError, match="data.path"):
            parse_paths(wrong)
