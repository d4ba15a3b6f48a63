"""Read the samples at the positions of streams into rows of a batch, in one process.

This file handles bad samples. A stream's position counts all its samples, good and bad. A step takes the next good
ones, so the samples of a step depend only on the data, and not on the process that reads them.
"""

import errno
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from maskalign.config.teacher_names import class_field
from maskalign.data.format.manifest import class_member, teacher_member
from maskalign.data.format.members import KEY, KIND
from maskalign.data.stream.decode import BadSample, decode_label, decode_stored_image
from maskalign.data.stream.open_shard import BadShard, OpenShard
from maskalign.data.stream.order import FLIP, Cursor, drawn_by, hash_key
from maskalign.errors import RunError

LARGE_SAMPLE = 2**17  # bytes; samples of at least this size can be read singly as fast as a whole shard


@dataclass(frozen=True)
class Column:
    """One tensor of a batch: its name, the extension of its member, and the shape and dtype of one sample.

    With `finite`, a sample with an infinity or a NaN is bad.
    """

    name: str
    ending: str
    shape: tuple
    dtype: str
    finite: bool = False


def columns_of(manifest, fields=None):
    """The columns of a data set: those in `fields`, or all without class tokens if `fields` is None."""
    columns = []
    if manifest.image_format:
        side = manifest.resolution
        columns.append(Column("image", manifest.image_format, (manifest.channels, side, side), "uint8"))
    if manifest.latent:
        latent = manifest.latent
        columns.append(Column("moments", "moments.npy", tuple(latent["shape"]), latent["dtype"]))
    for name, entry in manifest.teachers.items():
        shape = (entry["tokens"], entry["dim"])
        columns.append(Column(name, f"{teacher_member(name)}.npy".lower(), shape, entry["dtype"]))
        class_token = entry.get("class_token")
        if fields is not None and class_token is not None:
            ending, shape = class_member(name).lower(), (class_token["dim"],)
            columns.append(Column(class_field(name), ending, shape, class_token["dtype"], finite=True))
    return [column for column in columns if fields is None or column.name in fields]


@dataclass
class OpenDataSet:
    """One data set of a mixture."""

    opener: object
    manifest: object
    order: object
    columns: list

    def endings(self):
        """The extensions of all members that may be read."""
        endings = ["cls"] + [column.ending for column in self.columns]
        if self.manifest.hflip:
            endings += [f"flip.{column.ending}" for column in self.columns if column.name != "image"]
        if "jpg" in endings:
            endings.append("jpeg")
        return endings


@dataclass
class Share:
    """A rank's share of a logical stream: of the stream's samples in each step, the rank keeps low <= i < high."""

    stream: int
    low: int
    high: int


@dataclass
class Filled:
    """The result of one process for one step: the samples kept, the new positions, and the bad samples skipped."""

    keys: list = field(default_factory=list)
    epochs: list = field(default_factory=list)
    positions: dict = field(default_factory=dict)  # stream -> one position per data set
    bad: list = field(default_factory=list)  # (data set, shard, sample, key or None, reason, whole shard?)


class ShardTable:
    """The open shards of one process, with the number of streams that hold each. Threads open them before use."""

    def __init__(self, sources, verify, read_ahead_bytes, threads=4):
        self.sources, self.verify, self.threads = sources, verify, threads
        self.read_ahead_bytes, self.held_bytes = read_ahead_bytes, 0
        self.entries = {}  # (data set, shard) -> [future, holders, OpenShard once it was needed, else None]
        self.proven = {}  # (data set, shard) -> (OpenShard.identity, OpenShard.proven)
        self._executor = None
        for source in sources:
            source.opener.stopped.clear()

    def hold(self, released, held, dataset):
        """Release some shards of a data set and hold others; held shards are opened in the background."""
        for shard in held:
            entry = self.entries.get((dataset, shard))
            if entry is None:
                self._executor = self._executor or ThreadPoolExecutor(self.threads, "maskalign-shards")
                self.held_bytes += self.sources[dataset].manifest.shards[shard].bytes
                future = self._executor.submit(self._open, dataset, shard)
                entry = self.entries[dataset, shard] = [future, 0, None]
            entry[1] += 1
        for shard in released:
            entry = self.entries[dataset, shard]
            entry[1] -= 1
            if not entry[1]:
                del self.entries[dataset, shard]
                self.held_bytes -= self.sources[dataset].manifest.shards[shard].bytes
                if not entry[0].cancel():
                    entry[0].add_done_callback(_close_result)

    def get(self, dataset, shard):
        """The `OpenShard`; raises BadShard."""
        entry = self.entries[dataset, shard]
        if entry[2] is None:
            entry[2] = entry[0].result()
        return entry[2]

    def read_ahead(self, dataset, rows):
        """Ask the system to read [shard, sample] rows from the disk, because they are needed soon."""
        for number, sample in rows:
            try:
                self.get(dataset, number).read_ahead(sample)
            except BadShard:
                continue  # reported when a sample of it is read

    def close(self):
        """Close all shards, and cancel those that are being opened."""
        for source in self.sources:
            source.opener.stopped.set()
        for future, *_ in self.entries.values():
            if not future.cancel():
                future.add_done_callback(_close_result)
        self.entries.clear()
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _open(self, dataset, number):
        source = self.sources[dataset]
        shard = source.manifest.shards[number]
        fd = source.opener.open(shard)
        if hasattr(os, "posix_fadvise"):  # not on macOS
            if shard.bytes > LARGE_SAMPLE * shard.num_samples:
                # Opening reads only a few pages; the system's readahead would delay it.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
            elif self.held_bytes <= self.read_ahead_bytes:
                # One long read is faster than many short ones of headers and samples.
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_WILLNEED)
        checked = source.manifest.extra.get(KEY) == KIND
        try:
            opened = OpenShard(fd, shard, source.endings(), checked, self.verify)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise RunError(f"{shard.name}: {error.strerror}; raise `ulimit -n` or use fewer streams") from None
            raise BadShard(f"cannot be read: {error.strerror or error}") from None
        # Checksums of large members are verified only the first time that this process reads them.
        known, proven = self.proven.get((dataset, number), (None, opened.proven))
        if known == opened.identity:
            opened.proven = proven
        self.proven[dataset, number] = opened.identity, opened.proven
        return opened


def _close_result(future):
    if not future.cancelled() and future.exception() is None:
        future.result().close()


class SampleReader:
    """Fills rows of batches with samples from some of the streams.

    Args:
        sources: the data sets, a list of `OpenDataSet`.
        mixture: the `mixture.Mixture`, which assigns draws to data sets.
        shares: the `Share`s of this process, in the order of their rows.
        positions: {stream: list with one position per data set}.
        settings: dict with seed, streams, epochs (or None), hflip, verify, bad_limit (the largest number of bad
            samples),
            read_ahead_bytes (shards of small samples are read completely while at most this many bytes are held).
        bad: (data set, shard, sample) of bad samples that are already known.
    """

    def __init__(self, sources, mixture, shares, positions, settings, bad=()):
        self.sources, self.mixture, self.shares, self.settings = sources, mixture, shares, settings
        self.seed, self.streams = settings["seed"], settings["streams"]
        self.table = ShardTable(sources, settings["verify"], settings["read_ahead_bytes"])
        self.scratch, self.bad = None, set(bad)
        total = sum(source.order.total for source in sources)
        self.hopeless = 3 * total + 1000  # after this many draws without a good sample, there cannot be one
        epochs = settings["epochs"]
        # In a mixture, an epoch is a number of draws, so the data sets do not end with it.
        self.last = epochs * total if epochs is not None and len(sources) == 1 else None
        self.cursors = {
            share.stream: [self._cursor(share.stream, d, p) for d, p in enumerate(positions[share.stream])]
            for share in shares
        }

    def close(self):
        """Close all shards."""
        self.table.close()

    def _cursor(self, stream, dataset, position):
        def watch(released, held):
            self.table.hold(released, held, dataset)

        end = None if self.last is None else drawn_by(stream, self.last, self.streams)
        return Cursor(self.sources[dataset].order, stream, position, watch, end)

    def fill(self, start, stop, rows, row):
        """Read this process's part of the samples `start` to `stop` of the job.

        Args:
            start, stop: the samples of the step, counted over the whole job without bad samples.
            rows: {column name (and "label"): array with one row per sample of the rank}.
            row: first row to fill.

        Returns:
            A `Filled`. It has fewer samples if a finite stream ends, or if there are too many bad samples.

        Raises:
            RunError: there is no good sample left.
        """
        filled = Filled()
        if self.scratch is None:
            self.scratch = {name: np.empty_like(array[:1]) for name, array in rows.items()}
        for share in self.shares:  # all together, so that the disk has many requests in parallel
            for dataset, cursor in enumerate(self.cursors[share.stream]):
                ahead = 2 * drawn_by(0, stop - start, self.streams)
                self.table.read_ahead(dataset, cursor.upcoming(ahead))
        for share in self.shares:
            stream = share.stream
            cursors = self.cursors[stream]
            wanted = drawn_by(stream, stop, self.streams) - drawn_by(stream, start, self.streams)
            end = cursors[0].end
            got = barren = 0
            while got < wanted and (end is None or cursors[0].position < end):
                dataset = self.mixture(stream, sum(cursor.position for cursor in cursors))
                cursor = cursors[dataset]
                epoch, shard, sample = cursor.peek()
                keep = share.low <= got < share.high
                try:
                    target = (rows, row) if keep else (self.scratch, 0)
                    key = self._read(dataset, epoch, shard, sample, *target)
                except BadSample as error:
                    if (dataset, shard, sample) not in self.bad:
                        self.bad.add((dataset, shard, sample))
                        filled.bad.append(self._describe(dataset, shard, sample, error))
                        if len(self.bad) > self.settings["bad_limit"]:
                            return filled
                    barren += 1
                    if barren > self.hopeless:
                        raise RunError(f"{self.sources[dataset].opener.root}: no good sample left") from None
                else:
                    got, barren = got + 1, 0
                    if keep:
                        filled.keys.append(key)
                        filled.epochs.append(epoch)
                        row += 1
                cursor.advance()
            filled.positions[stream] = [cursor.position for cursor in cursors]
        return filled

    def _read(self, dataset, epoch, number, sample, rows, row):
        """Read one sample into its row; returns its key."""
        source = self.sources[dataset]
        shard = self.table.get(dataset, number)
        if sample >= len(shard):
            raise BadSample(f"missing, the shard holds {len(shard)} samples")
        rows["label"][row] = decode_label(shard.read(sample, "cls", 64), source.manifest.num_classes)
        key = shard.keys[sample]
        flip = (
            source.manifest.hflip
            and self.settings["hflip"]
            and hash_key(self.seed, epoch, dataset, FLIP, zlib.crc32(key)) & 1
        )
        variant = 2 if flip else 1
        proven = shard.proven[sample] & variant
        for column in source.columns:
            ending, out = column.ending, rows[column.name][row]
            if column.name == "image":
                if ending == "jpg" and not shard.has(sample, "jpg"):
                    ending = "jpeg"
                pixels = decode_stored_image(shard.read(sample, ending), source.manifest.resolution)
                out[:] = (pixels[:, ::-1] if flip else pixels).transpose(2, 0, 1)
            else:
                ending = f"flip.{ending}" if flip else ending
                shard.read_array(sample, ending, out, proven)
                if column.finite and not np.isfinite(out).all():
                    raise BadSample(f".{ending} holds numbers that are not finite")
        shard.proven[sample] |= variant
        return key.decode("utf-8", "replace")

    def _describe(self, dataset, number, sample, error):
        whole = isinstance(error, BadShard)
        key = None
        if not whole:
            shard = self.table.get(dataset, number)
            key = shard.keys[sample].decode("utf-8", "replace") if sample < len(shard) else None
        return dataset, number, sample, key, str(error), whole
