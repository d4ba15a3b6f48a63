"""Which sample comes when: pure functions of (seed, epoch, stream), the same on every machine.

An epoch of N samples is dealt to S logical streams by count. The g-th sample that the whole job draws,
counted over all epochs, comes from stream g % S, so every step of B samples (S divides B) takes B/S from each
stream and an epoch ends after exactly N of them. In each epoch the shards are permuted and laid end to end,
and stream s gets the s-th stretch of that line; a shard on a border is shared between neighbours by a
permutation of its samples. Inside a stream, the stretches of `group` shards are permuted together. So a data
set of one shard works with any number of streams, and one of 100,000 shards needs no more than one integer
per stream to say where it is.
"""

from functools import lru_cache

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
SHARDS, SAMPLES, GROUP, FLIP = 1, 2, 3, 4  # what a permutation is for; part of its key


def mix64(x):
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on a Python int or a uint64 array."""
    if isinstance(x, int):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*values):
    """64-bit hash of a tuple of integers (negative ones too)."""
    state = 0
    for value in values:
        state = mix64((state + GOLDEN + (int(value) & MASK)) & MASK)
    return state


def permutation(n, *key):
    """Permutation of range(n) keyed by integers, as an int64 array.

    Sorting hashed indices is used and not `numpy.random`, whose streams may change between versions: a
    checkpoint must mean the same order years later.
    """
    draws = mix64(np.uint64(hash_key(*key)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return np.argsort(draws, kind="stable")


def drawn_by(stream, total, streams):
    """How many of the first `total` samples of the job come from `stream` (numbers or arrays)."""
    return (total - stream + streams - 1) // streams


def default_streams(batch_size, most=64):
    """Number of logical streams where none is given: a divisor of the batch size, at most `most`.

    It depends on nothing but the batch size, so neither ranks nor workers change the order. Divisors that
    keep the batch size's power of two are preferred: those are dealt to 2, 4, 8, 16 ranks without a
    remainder.
    """
    divisors = [d for d in range(1, min(batch_size, most) + 1) if batch_size % d == 0]
    two = min(batch_size & -batch_size, most)
    return max((d for d in divisors if d % two == 0), default=divisors[-1])


def default_group(streams):
    """Shards that one stream permutes together: so many that 32 or more mix at any time, at least 2."""
    return max(2, -(-32 // streams))


class Order:
    """The order of one data set.

    Args:
        counts: samples in each shard.
        streams: number of logical streams, S.
        group: shards (or parts of shards) of a stream that are permuted together.
        seed: any integer.
        dataset: number of the data set in a mixture, part of every key.
    """

    def __init__(self, counts, streams, group, seed, dataset=0):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.streams, self.group, self.seed, self.dataset = streams, group, seed, dataset
        # The streams of one process are in two epochs at a time at most (bad samples make them drift).
        self._line = lru_cache(maxsize=3)(self._make_line)

    def _make_line(self, epoch):
        """Permuted shards and where each one ends when they are laid end to end."""
        shards = permutation(len(self.counts), self.seed, epoch, self.dataset, SHARDS)
        return shards, np.cumsum(self.counts[shards])

    def locate(self, stream, position):
        """(epoch, offset in the stream's stretch of it) of the stream's sample number `position`."""
        epoch = (position * self.streams + stream) // self.total
        return epoch, position - drawn_by(stream, epoch * self.total, self.streams)

    def stretch(self, stream, epoch):
        """[(shard, low, high), ...]: the parts of shards that a stream reads in an epoch, in order.

        `low` and `high` bound positions in the shard's own permutation of that epoch.
        """
        numbers = np.arange(stream + 1)
        before, after = epoch * self.total, (epoch + 1) * self.total
        shares = drawn_by(numbers, after, self.streams) - drawn_by(numbers, before, self.streams)
        stop = int(shares.sum())
        start = stop - int(shares[-1])
        if start == stop:
            return []
        shards, ends = self._line(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = []
        for place in range(int(first), int(last) + 1):
            shard, end = int(shards[place]), int(ends[place])
            begin = end - int(self.counts[shard])
            low, high = max(start, begin) - begin, min(stop, end) - begin
            if low < high:
                parts.append((shard, low, high))
        return parts

    def groups(self, stream, epoch):
        """The stretch of an epoch cut into groups: a list of lists of parts."""
        parts = self.stretch(stream, epoch)
        return [parts[i : i + self.group] for i in range(0, len(parts), self.group)]

    def permuted(self, stream, epoch, number, parts):
        """(shard, sample) of every sample of group `number`, in reading order: int64 array (n, 2)."""
        rows = []
        for shard, low, high in parts:
            n = int(self.counts[shard])
            samples = permutation(n, self.seed, epoch, self.dataset, SAMPLES, shard)[low:high]
            rows.append(np.stack([np.full_like(samples, shard), samples], axis=1))
        rows = np.concatenate(rows)
        return rows[permutation(len(rows), self.seed, epoch, self.dataset, GROUP, stream, number)]


class Cursor:
    """Walks one stream of an `Order`, one sample at a time, and says which shards it holds and needs next.

    Args:
        order: the data set's order.
        stream: number of the logical stream.
        position: samples that the stream has drawn already.
        watch: called with (shards let go, shards held from now on) whenever the cursor enters a group. A held
            shard is one that this group or the next still has to read, so never a finished one.
    """

    def __init__(self, order, stream, position=0, watch=lambda released, held: None):
        self.order, self.stream, self.position, self.watch = order, stream, position, watch
        self._rows, self._next, self._named, self._epoch = np.empty((0, 2), np.int64), 0, 0, 0
        self._ahead = self._held = None

    def peek(self):
        """(epoch, shard, sample) at the position."""
        if self._next >= len(self._rows):
            self._enter()
        shard, sample = self._rows[self._next].tolist()
        return self._epoch, shard, sample

    def advance(self):
        """Go on to the next sample."""
        self.position += 1
        self._next += 1

    def upcoming(self, n):
        """[shard, sample] of the next n samples, each of them named once, and none beyond the group."""
        first, last = max(self._next, self._named), self._next + n
        self._named = max(first, last)
        return self._rows[first:last].tolist()

    def _enter(self):
        """Load the group that holds the position."""
        order = self.order
        epoch, offset = order.locate(self.stream, self.position)
        groups = order.groups(self.stream, epoch)
        sizes = [sum(high - low for _, low, high in parts) for parts in groups]
        number = 0
        while offset >= sizes[number]:
            offset -= sizes[number]
            number += 1
        self._rows = order.permuted(self.stream, epoch, number, groups[number])
        self._next, self._named, self._epoch = offset, offset, epoch
        if number + 1 < len(groups):
            following = groups[number + 1]
        else:
            later, _ = order.locate(self.stream, self.position + len(self._rows) - offset)
            following = order.groups(self.stream, later)[0]
        now = [int(shard) for shard in dict.fromkeys(self._rows[offset:, 0].tolist())]
        held = now + [shard for shard, _, _ in following if shard not in now]
        released, self._held = self._held or [], held
        self.watch(released, held)
