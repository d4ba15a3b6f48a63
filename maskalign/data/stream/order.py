"""The order of samples: pure functions of (seed, epoch, stream), with the same result on every machine.

An epoch of N samples is divided among S logical streams. The g-th sample that the whole job draws, counted over all
epochs, comes from stream g % S. So every step of B samples (S divides B) takes B/S samples from each stream, and an
epoch ends after exactly N samples. In each epoch the shards are permuted and concatenated, and stream s gets the s-th
part of the sequence. The samples of a shard on a border are permuted and divided between both streams. Within a stream,
the parts of `group` shards are permuted together. A data set of one shard therefore works with any number of streams,
and the position in a data set of 100,000 shards is one integer per stream.
"""

from functools import lru_cache

import numpy as np

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
SHARDS, SAMPLES, GROUP, FLIP = 1, 2, 3, 4  # the purpose of a permutation, which is part of its key


def mix64(x):
    """SplitMix64's finalizer (Steele, Lea, Flood 2014) on a Python int or a uint64 array."""
    if isinstance(x, int):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        return x ^ (x >> 31)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*values):
    """64-bit hash of a tuple of integers, which may be negative."""
    state = 0
    for value in values:
        state = mix64((state + GOLDEN + (int(value) & MASK)) & MASK)
    return state


def permutation(n, *key):
    """Permutation of range(n) keyed by integers, as an int64 array.

    It sorts hashed indices instead of using `numpy.random`, whose streams may change between versions: the position in
    a checkpoint must refer to the same order years later.
    """
    draws = mix64(np.uint64(hash_key(*key)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(GOLDEN))
    return np.argsort(draws, kind="stable")


def drawn_by(stream, total, streams):
    """The number of samples from `stream` among the first `total` samples of the job (numbers or arrays)."""
    return (total - stream + streams - 1) // streams


def default_streams(batch_size, most=64):
    """The default number of logical streams: a divisor of the batch size, at most `most`.

    It depends only on the batch size, so that ranks and workers do not change the order. Divisors with the same power
    of two as the batch size are preferred, because they can be divided evenly among 2, 4, 8 or 16 ranks.
    """
    divisors = [d for d in range(1, min(batch_size, most) + 1) if batch_size % d == 0]
    two = min(batch_size & -batch_size, most)
    return max((d for d in divisors if d % two == 0), default=divisors[-1])


def default_group(streams):
    """The default number of shards that one stream permutes together: at least 2, and 32 over all streams."""
    return max(2, -(-32 // streams))


class Order:
    """The order of one data set.

    Args:
        counts: number of samples in each shard.
        streams: number of logical streams, S.
        group: number of shards (or parts of shards) of a stream that are permuted together.
        seed: any integer.
        dataset: number of the data set in a mixture, which is part of every key.
    """

    def __init__(self, counts, streams, group, seed, dataset=0):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.total = int(self.counts.sum())
        self.streams, self.group, self.seed, self.dataset = streams, group, seed, dataset
        # The streams of one process are in at most two epochs at the same time (bad samples move them apart).
        self._line = lru_cache(maxsize=3)(self._make_line)

    def _make_line(self, epoch):
        """The permuted shards, and the end of each one when they are concatenated."""
        shards = permutation(len(self.counts), self.seed, epoch, self.dataset, SHARDS)
        return shards, np.cumsum(self.counts[shards])

    def locate(self, stream, position):
        """(epoch, offset in the stream's part of the epoch) of the stream's sample number `position`."""
        epoch = (position * self.streams + stream) // self.total
        return epoch, position - drawn_by(stream, epoch * self.total, self.streams)

    def stretch(self, stream, epoch):
        """(shard, low, high) of the parts of shards that a stream reads in an epoch: int64 array (n, 3).

        The part is positions `low` <= i < `high` of the shard's permutation in this epoch.
        """
        numbers = np.arange(stream + 1)
        before, after = epoch * self.total, (epoch + 1) * self.total
        shares = drawn_by(numbers, after, self.streams) - drawn_by(numbers, before, self.streams)
        stop = int(shares.sum())
        start = stop - int(shares[-1])
        if start == stop:
            return np.empty((0, 3), np.int64)
        line, ends = self._line(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        shards, ends = line[first : last + 1], ends[first : last + 1]
        begins = ends - self.counts[shards]
        parts = np.stack([shards, np.maximum(start - begins, 0), np.minimum(stop, ends) - begins], axis=1)
        return parts[parts[:, 1] < parts[:, 2]]

    def permuted(self, stream, epoch, number, parts):
        """(shard, sample) of every sample of group `number`, in reading order: int64 array (n, 2).

        Args:
            stream, epoch, number: the group.
            parts: its rows of `stretch`.
        """
        rows = []
        for shard, low, high in parts.tolist():
            n = int(self.counts[shard])
            samples = permutation(n, self.seed, epoch, self.dataset, SAMPLES, shard)[low:high]
            rows.append(np.stack([np.full_like(samples, shard), samples], axis=1))
        rows = np.concatenate(rows)
        return rows[permutation(len(rows), self.seed, epoch, self.dataset, GROUP, stream, number)]


class Cursor:
    """Iterates over one stream of an `Order`, one sample at a time, and reports the shards that it needs.

    Args:
        order: the data set's order.
        stream: number of the logical stream.
        position: number of samples that the stream has drawn already.
        watch: called with (released shards, held shards) when the cursor enters a group. The held shards are those from
            which this group or the next still has to read.
        end: position at which the stream ends, or None; shards after it are not held.
    """

    def __init__(self, order, stream, position=0, watch=lambda released, held: None, end=None):
        self.order, self.stream, self.position, self.watch = order, stream, position, watch
        self._rows, self._next, self._named, self._epoch = np.empty((0, 2), np.int64), 0, 0, 0
        self.end = end
        self._held, self._stretches = [], {}

    def peek(self):
        """(epoch, shard, sample) at the position."""
        if self._next >= len(self._rows):
            self._enter()
        shard, sample = self._rows[self._next].tolist()
        return self._epoch, shard, sample

    def advance(self):
        """Advance to the next sample."""
        self.position += 1
        self._next += 1

    def upcoming(self, n):
        """[shard, sample] of the next n samples of the group, without those returned by earlier calls."""
        first, last = max(self._next, self._named), self._next + n
        self._named = max(first, last)
        return self._rows[first:last].tolist()

    def _parts(self, epoch):
        """The stream's parts of shards in an epoch, and the end of each part."""
        if epoch not in self._stretches:
            parts = self.order.stretch(self.stream, epoch)
            self._stretches = {e: s for e, s in self._stretches.items() if e == epoch - 1}
            self._stretches[epoch] = parts, np.cumsum(parts[:, 2] - parts[:, 1])
        return self._stretches[epoch]

    def _enter(self):
        """Load the group that contains the position."""
        order, size = self.order, self.order.group
        epoch, offset = order.locate(self.stream, self.position)
        parts, ends = self._parts(epoch)
        number = int(np.searchsorted(ends, offset, side="right")) // size
        if number:
            offset -= int(ends[number * size - 1])
        rows = order.permuted(self.stream, epoch, number, parts[number * size : (number + 1) * size])
        following = parts[(number + 1) * size : (number + 2) * size]
        if not len(following):
            after = self.position + len(rows) - offset
            if self.end is None or after < self.end:
                following = self._parts(order.locate(self.stream, after)[0])[0][:size]
        self._rows, self._next, self._named, self._epoch = rows, offset, offset, epoch
        held = dict.fromkeys(rows[offset:, 0].tolist())
        held = list(held | dict.fromkeys(following[:, 0].tolist()))
        released, self._held = self._held, held
        self.watch(released, held)
