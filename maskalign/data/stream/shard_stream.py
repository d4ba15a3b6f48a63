"""The stream of training batches, with a position for checkpoints.

The samples and their order are the same on any number of ranks and workers, and each sample occurs exactly once per
epoch. order.py defines the order, opening.py and open_shard.py read samples, samples.py skips bad ones, and workers.py
reads ahead. This file divides the samples of a step among the ranks and stores the position.
"""

import os
import resource
import time
from pathlib import Path
from typing import Any, Collection, Dict, Iterator, List, Mapping, Optional, Sequence, Union

import torch

from maskalign.config.teacher_names import class_field, no_class_tokens
from maskalign.data.stream.bad_samples import BadSamples
from maskalign.data.stream.buffers import BlockPool, Layout
from maskalign.data.stream.mixture import Mixture, check_class_tokens, open_data_sets
from maskalign.data.stream.order import Order, default_group, default_streams, drawn_by
from maskalign.data.stream.position import MOST_BAD_IN_STATE, STATE_VERSION, parse_state
from maskalign.data.stream.samples import OpenDataSet, SampleReader, Share, columns_of
from maskalign.data.stream.workers import InProcess, WorkerPool
from maskalign.errors import UsageError


class ShardStream:
    """Batches of one rank, read from a data set of shards.

    Iteration continues from the current position; a stream that has ended yields nothing. A batch is a dict:

    - "key": list of b strings; "label": (b,) int64; "epoch": (b,) int64, the pass over the data set.
    - "image": (b, 3, H, W) uint8; "moments": (b, 2C, h, w); (b, tokens, dim) for each teacher, under its name. Each
      exists
      if the data set has it, in the dtype of the manifest.
    - "TEACHER.class": the teacher's class token (b, dim) float16, only if `fields` contains it.
    - "slot": position of the first sample in the step's global batch; the other samples follow it.
    - "bad": number of new bad samples since the previous batch.

    The global batch of a step has the same samples, at the same slots, for every world size and number of workers. With
    `epochs` the last batch is smaller, and with several ranks a rank's share of it may be empty (every rank yields the
    same number of batches). A bad sample is skipped, and the next sample of its logical stream is used instead. With
    `epochs`, a stream may end, so that there is no next sample. The following samples of the rank then move up, so
    slots at the very end depend on the world size.

    Args:
        path: folder or URL prefix of a data set; or several data sets with weights, as {path: weight} or a list.
            Weights
            are shares of the samples. An epoch is then as many draws as the data sets have samples.
        batch_size: samples per step over all ranks; a multiple of `world_size`.
        seed: seed of the order.
        rank, world_size: the share of each batch that this stream yields.
        num_workers: number of processes that read ahead; with 0, this process reads.
        epochs: number of passes over the data, None for an endless stream.
        streams: number of logical streams, a divisor of `batch_size`, from which the default is derived. It should be a
            multiple of ranks x workers, so that each owns whole streams.
        group: number of shards that a stream permutes together; the default mixes at least 32 at any time.
        fields: names of the tensors to read ("image", "moments", teachers, "TEACHER.class"), None for all except class
            tokens.
        max_bad_fraction: share of bad samples in the whole data set (those known to this rank and the loaded state)
            above
            which a RunError stops the run.
        hflip: if the data set stores mirrored variants, draw one of the two by (seed, epoch, key).
        verify: compare checksums.
        prefetch: number of batches that the workers read ahead.
        pin_memory: return tensors in pinned memory; None does so if there is a GPU.
        timeout, retries, cache_dir, allow_pipe: for remote data sets, see opening.Opener.

    Attributes:
        manifest: the `Manifest` of the (first) data set.
        wait_seconds: time that the consumer has waited for batches.

    Raises:
        UsageError: settings do not match each other or the data.
        RunError: during iteration: too many bad samples, or a worker that dies repeatedly.
    """

    def __init__(
        self,
        path: Union[str, Path, Sequence[str], Mapping[str, float]],
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        epochs: Optional[int] = None,
        *,
        streams: Optional[int] = None,
        group: Optional[int] = None,
        fields: Optional[Collection[str]] = None,
        max_bad_fraction: float = 0.01,
        hflip: bool = True,
        verify: bool = True,
        prefetch: int = 4,
        pin_memory: Optional[bool] = None,
        timeout: float = 30.0,
        retries: int = 5,
        cache_dir: Union[str, Path, None] = None,
        allow_pipe: bool = False,
    ):
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("num_workers", num_workers, 0),
            ("epochs", 1 if epochs is None else epochs, 1),
            ("streams", 1 if streams is None else streams, 1),
            ("group", 1 if group is None else group, 1),
            ("prefetch", prefetch, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}; give an integer of at least {least}")
        if rank >= world_size:
            raise UsageError(f"rank {rank} is not below world_size {world_size}")
        if batch_size % world_size:
            raise UsageError(
                f"batch_size {batch_size} cannot be dealt to {world_size} ranks evenly; give a multiple of {world_size}"
            )
        if streams is not None and batch_size % streams:
            raise UsageError(f"streams {streams} does not divide batch_size {batch_size}; give a divisor of it")
        if not 0 <= max_bad_fraction <= 1:
            raise UsageError(f"max_bad_fraction is {max_bad_fraction!r}; give a number from 0 to 1")
        self.batch_size, self.seed, self.rank, self.world_size = batch_size, int(seed), rank, world_size
        self.num_workers, self.epochs, self.prefetch = num_workers, epochs, prefetch
        self.pin_memory = torch.cuda.is_available() if pin_memory is None else pin_memory
        self.hflip, self.verify = hflip, verify
        self.given_streams, self.given_group = streams, group

        self.weights, self.openers, self.manifests = open_data_sets(
            path, timeout=timeout, retries=retries, cache_dir=cache_dir, allow_pipe=allow_pipe
        )
        self.manifest = self.manifests[0]
        self.columns = columns_of(self.manifest, fields)
        if fields is not None and (missing := set(fields) - {column.name for column in self.columns}):
            there = ", ".join(sorted(column.name for column in columns_of(self.manifest)))
            name, root = sorted(missing)[0], self.openers[0].root
            if name in map(class_field, self.manifest.teachers):
                raise UsageError(f"{root}: {no_class_tokens(name.removesuffix('.class'), root)}")
            raise UsageError(f"{root}: there is no {name!r}; it has {there}")
        class_tokens = [name for name in self.manifest.teachers if fields is not None and class_field(name) in fields]
        check_class_tokens([opener.root for opener in self.openers], self.manifests, class_tokens)
        self.num_samples = sum(manifest.num_samples for manifest in self.manifests)

        self.wait_seconds = 0.0
        self._bad = BadSamples(self.openers[0].root, self.manifests, max_bad_fraction)
        self._engine: Any = None  # InProcess or WorkerPool, while an iterator is open
        self._generation = 0
        self.served = 0  # samples of the whole job that have been yielded, without bad ones
        self._deal(streams or default_streams(batch_size), group)
        self.positions = {share.stream: [0] * len(self.openers) for share in self.shares}

    def _deal(self, streams, group):
        """Set the number of logical streams, and determine those of this rank."""
        self.streams, self.group = streams, group or default_group(streams)
        each, local = self.batch_size // streams, self.batch_size // self.world_size
        low, high = self.rank * local, (self.rank + 1) * local
        self.shares = [
            Share(stream, max(low - stream * each, 0), min(high - stream * each, each))
            for stream in range(low // each, (high - 1) // each + 1)
        ]
        orders = [
            Order([shard.num_samples for shard in manifest.shards], streams, self.group, self.seed, number)
            for number, manifest in enumerate(self.manifests)
        ]
        self.sources = [
            OpenDataSet(opener, manifest, order, self.columns)
            for opener, manifest, order in zip(self.openers, self.manifests, orders, strict=True)
        ]
        self.mixture = Mixture(self.weights, streams)

    @property
    def bad_samples(self) -> List[str]:
        """One line per bad sample found so far."""
        return self._bad.lines

    # -- batches

    def __iter__(self) -> Iterator[Dict[str, Any]]:
        self.close()
        return self._batches(self._generation)

    def close(self) -> None:
        """Stop the workers and close all shards. The position is kept, and iteration continues from it."""
        self._generation += 1
        if self._engine is not None:
            self._engine.close()
            self._pool.close()
            self._engine = None

    def _batches(self, generation):
        if generation != self._generation:
            return
        self._open_engine()
        try:
            while True:
                start = time.perf_counter()
                result = self._engine.next()
                if result is None:
                    return
                batch = self._batch(*result)
                self.wait_seconds += time.perf_counter() - start
                del result  # a reference would keep the block in use while the consumer works
                if batch["key"] or self.world_size > 1:
                    yield batch
                    del batch
                if generation != self._generation:
                    raise UsageError("this iterator has ended: another was started or a state was loaded meanwhile")
        finally:
            if generation == self._generation:
                self.close()

    def _open_engine(self):
        _raise_file_limit(2 * (self.group + 1) * len(self.shares) * len(self.sources) + 128)
        self._pool = BlockPool(Layout(self.columns, self.batch_size // self.world_size), shared=self.num_workers > 0)
        settings = {
            "seed": self.seed,
            "streams": self.streams,
            "epochs": self.epochs,
            "hflip": self.hflip,
            "verify": self.verify,
            "bad_limit": self._bad.limit,
            # A quarter of the memory for the page cache, assuming that all ranks are on this machine.
            "read_ahead_bytes": _memory() // 4 // (max(self.num_workers, 1) * self.world_size),
        }

        def make_reader(shares, positions):
            return SampleReader(self.sources, self.mixture, shares, positions, settings, self._bad.places)

        if self.num_workers:
            self._engine = WorkerPool(
                make_reader,
                self._pool,
                self.shares,
                self.positions,
                self._plan(),
                self._rows,
                self.num_workers,
                self.prefetch,
            )
        else:
            self._engine = InProcess(make_reader, self._pool, self.shares, self.positions, self._plan())

    def _plan(self):
        """Yield (start, stop) of every step from the position on, in samples of the whole job."""
        start, end = self.served, None if self.epochs is None else self.epochs * self.num_samples
        while end is None or start < end:
            stop = start + self.batch_size if end is None else min(start + self.batch_size, end)
            yield start, stop
            start = stop

    def _rows(self, shares, start, stop):
        """The number of rows that some shares fill in a step without bad samples."""
        rows = 0
        for share in shares:
            given = drawn_by(share.stream, stop, self.streams) - drawn_by(share.stream, start, self.streams)
            rows += min(share.high, given) - min(share.low, given)
        return rows

    def _batch(self, arrays, parts):
        """Merge the results of the workers into a batch, and update the position."""
        start = self.served
        end = start + self.batch_size
        if self.epochs is not None:
            end = min(end, self.epochs * self.num_samples)
        keys, epochs, new = [], [], 0
        for row, filled in parts:
            if row != len(keys):  # at the very end, an earlier share may have fewer samples: close the gap
                for array in arrays.values():
                    array[len(keys) : len(keys) + len(filled.keys)] = array[row : row + len(filled.keys)].copy()
            keys += filled.keys
            epochs += filled.epochs
            self.positions.update(filled.positions)
            new += self._bad.note(filled.bad)
        self._bad.check()
        self.served = end
        batch = {name: self._tensor(array[: len(keys)]) for name, array in arrays.items()}
        first = self.shares[0]
        before = [Share(stream, 0, self.batch_size) for stream in range(first.stream)]
        slot = self._rows(before + [Share(first.stream, 0, first.low)], start, end)
        return {
            "key": keys,
            "epoch": torch.tensor(epochs, dtype=torch.int64),
            "slot": slot,
            "bad": new,
        } | batch

    def _tensor(self, array):
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self.pin_memory else tensor

    # -- position

    def state_dict(self) -> Dict[str, Any]:
        """The position after the last batch that was yielded: integers, strings and lists, below 1 MB.

        It contains this rank's streams; `merge_states` merges the states of all ranks.
        """
        streams = sorted(self.positions)
        return {
            "version": STATE_VERSION,
            "data": [manifest.digest() for manifest in self.manifests],
            "seed": self.seed,
            "streams": self.streams,
            "group": self.group,
            "served": self.served,
            "stream": streams,
            "position": [list(self.positions[stream]) for stream in streams],
            "bad": [list(place) for place in list(self._bad.places)[:MOST_BAD_IN_STATE]],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the position, so that the next batch is the one after it.

        The world size and the number of workers may differ from those when it was saved. The batch size may differ if
        it is a multiple of the number of logical streams.

        Raises:
            UsageError: the state has other data or another seed, or does not contain the streams of this rank.
        """
        here = {
            "version": STATE_VERSION,
            "data": [manifest.digest() for manifest in self.manifests],
            "seed": self.seed,
            "streams": self.given_streams,
            "group": self.given_group,
        }
        streams, group, served, positions, bad = parse_state(state, here)
        if self.batch_size % streams:
            raise UsageError(
                f"the stream's state has {streams} logical streams, which do not divide batch_size {self.batch_size}"
            )
        self.close()
        self._deal(streams, group)
        missing = [share.stream for share in self.shares if share.stream not in positions]
        if missing:
            raise UsageError(
                f"the stream's state lacks logical stream {missing[0]} of rank {self.rank}; "
                "join the states of all ranks with merge_states"
            )
        self.served = served
        self.positions = {share.stream: positions[share.stream] for share in self.shares}
        self._bad.places = dict.fromkeys(bad)


def _memory():
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _raise_file_limit(needed):
    """Allow as many open files as the streams' shards need, within the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        most = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
