"""MosaicML Streaming and Grain for comparison with our loader: the same latents, each in its own best layout.

`python -m benchmarks.loader` runs this file as a script with the interpreter that has the library: MosaicML Streaming
0.13 pins numpy below 2.2 and transformers below 5, which do not fit the other packages here, so it needs a separate
environment (`--streaming-python`). This file imports nothing from maskalign.

    python benchmarks/loader_peers.py NAME write ROOT
    python benchmarks/loader_peers.py NAME verify ROOT
    python benchmarks/loader_peers.py NAME warm|cold ROOT --batch B --workers N --samples N --seconds S

Layouts: MDS shards of 128 MiB without compression, and ArrayRecord files of 512 records, one per group, uncompressed;
random numbers do not compress. Both are written from the tar shards, and hold the same arrays and labels.
"""

import argparse
import io
import json
import multiprocessing
import os
import sys
import tarfile
import time
import zlib
from importlib import import_module

import numpy as np

MOMENTS, TOKENS = (8, 32, 32), (256, 768)
MOMENTS_BYTES, TOKENS_BYTES = int(np.prod(MOMENTS)) * 2, int(np.prod(TOKENS))
# The guarantees of each loader. Ours are tested in tests/data/stream. Those of MosaicML Streaming 0.13.0 are from its
# documentation (fast resumption, elastic determinism); those of Grain 0.2.18 are from its elastic_iterator.py.
PROMISES = {
    "exact resume": {
        "maskalign": "yes, from a few integers per logical stream in the checkpoint",
        "MosaicML Streaming": "yes, with its StreamingDataLoader",
        "Grain": "yes, from the state of its iterators",
    },
    "resume on another number of ranks": {
        "maskalign": "yes, and of workers; the batch size may change too",
        "MosaicML Streaming": "yes, with num_canonical_nodes fixed",
        "Grain": "with the experimental ElasticIterator, which also takes another batch size",
    },
    "same global batch on any number of ranks": {
        "maskalign": "yes, the same samples at the same positions",
        "MosaicML Streaming": "yes, with num_canonical_nodes fixed",
        "Grain": "the same samples with ElasticIterator, assigned to the ranks in another order",
    },
    "damaged samples": {
        "maskalign": "checksum per sample; skipped, counted and reported, up to a limit",
        "MosaicML Streaming": "optional hash per shard, checked at download; raises an error",
        "Grain": "raises an error; a filter may drop samples, but not with ElasticIterator",
    },
    "format": {
        "maskalign": "tar, readable by webdataset and other tools",
        "MosaicML Streaming": "MDS, its own format",
        "Grain": "ArrayRecord, its own format",
    },
}


def samples_of(shards):
    """Yield (moments, tokens, label) of every sample of a folder of tar shards, in order."""
    for name in sorted(name for name in os.listdir(shards) if name.endswith(".tar")):
        with tarfile.open(os.path.join(shards, name)) as tar:
            found = {}
            for info in tar:
                if info.name.startswith("__"):
                    continue
                data = tar.extractfile(info).read()
                ending = info.name.partition(".")[2]
                found["label" if ending == "cls" else "moments" if ending == "moments.npy" else "tokens"] = data
                if len(found) == 3:
                    arrays = (np.load(io.BytesIO(found[key])) for key in ("moments", "tokens"))
                    yield *arrays, int(found["label"])
                    found = {}


def write_streaming(shards, folder):
    """Write the same samples as MDS shards."""
    from streaming import MDSWriter

    shape = {"moments": MOMENTS, "tokens": TOKENS}
    first = next(samples_of(shards))
    columns = {
        key: f"ndarray:{array.dtype}:{','.join(map(str, array.shape))}"
        for key, array in zip(shape, first[:2], strict=True)
    }
    with MDSWriter(out=folder, columns=columns | {"label": "int"}, size_limit=2**27) as writer:
        for moments, tokens, label in samples_of(shards):
            writer.write({"moments": moments, "tokens": tokens, "label": label})


def read_streaming(folder, batch, workers):
    """Endless batches (moments, tokens, label) of StreamingDataset through torch's DataLoader."""
    import torch
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    class Samples(StreamingDataset):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            # A decoded array is a view of read-only bytes, and torch warns about this unless it is copied.
            return (
                torch.from_numpy(sample["moments"].copy()),
                torch.from_numpy(sample["tokens"].copy()),
                sample["label"],
            )

    data = Samples(local=folder, shuffle=True, batch_size=batch)
    loader = torch.utils.data.DataLoader(data, batch, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


def write_grain(shards, folder, per_file=512):
    """Write the same samples as ArrayRecord files: the bytes of both arrays and the label."""
    from array_record.python.array_record_module import ArrayRecordWriter

    os.makedirs(folder)
    shapes, writer = None, None
    for number, (moments, tokens, label) in enumerate(samples_of(shards)):
        shapes = {"moments": list(moments.shape), "tokens": list(tokens.shape)}
        if number % per_file == 0:
            if writer is not None:
                writer.close()
            path = os.path.join(folder, f"{number // per_file:06d}.array_record")
            writer = ArrayRecordWriter(path, "group_size:1,uncompressed")
        writer.write(moments.tobytes() + tokens.tobytes() + np.int64(label).tobytes())
    writer.close()
    with open(os.path.join(folder, "shapes.json"), "w") as file:
        json.dump(shapes, file)


def read_grain(folder, batch, workers):
    """Endless batches (moments, tokens, label) of a Grain pipeline."""
    import grain.python as grain
    import torch

    with open(os.path.join(folder, "shapes.json")) as file:
        shapes = json.load(file)
    moments, tokens = tuple(shapes["moments"]), tuple(shapes["tokens"])
    middle = int(np.prod(moments)) * 2
    end = middle + int(np.prod(tokens))

    def parse(record):
        data = np.frombuffer(record, np.uint8)
        return (
            data[:middle].view(np.float16).reshape(moments),
            data[middle:end].view(np.int8).reshape(tokens),
            np.frombuffer(record, np.int64, 1, end)[0],
        )

    names = sorted(name for name in os.listdir(folder) if name.endswith(".array_record"))
    source = grain.ArrayRecordDataSource([os.path.join(folder, name) for name in names])
    data = grain.MapDataset.source(source).shuffle(seed=0).repeat().map(parse)
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=2 * batch)
    data = data.to_iter_dataset(options).batch(batch)
    if workers:
        data = data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    for parts in data:
        yield tuple(torch.from_numpy(np.asarray(part)) for part in parts)


PEERS = {
    "streaming": ("MosaicML Streaming", write_streaming, read_streaming),
    "grain": ("Grain", write_grain, read_grain),
}
LIBRARIES = {"streaming": "streaming", "grain": "grain.python"}


def verify(shards, batches):
    """Raise a SystemExit unless one pass of a loader's batches has every sample of the tar shards exactly once."""
    want = sorted(_digest(*sample) for sample in samples_of(shards))
    found = []
    while len(found) < len(want):
        found += [_digest(*(np.asarray(part) for part in sample)) for sample in zip(*next(batches), strict=True)]
    if sorted(found[: len(want)]) != want:
        raise SystemExit(f"{len(set(want) - set(found))} of {len(want)} samples are missing in the loader's batches")


def _digest(moments, tokens, label):
    """A digest of a sample's dtypes, shapes and values."""
    parts = (np.asarray(moments), np.asarray(tokens))
    text = "".join(f"{part.dtype}{part.shape}{zlib.crc32(part.tobytes())}" for part in parts)
    return f"{text}{int(label)}"


def drop_pages(root):
    """Drop the content of all files below a folder from the page cache."""
    for folder, _, names in os.walk(root):
        for name in names:
            descriptor = os.open(os.path.join(folder, name), os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def warm(batches, samples, batch, seconds, count):
    """(samples per second, samples per CPU second) after one pass, measured for about `seconds`.

    `count` is a function from a batch to its number of samples.
    """
    for _ in range(1 + samples // batch):  # one pass
        next(batches)
    seen, start, cpu = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - start) < seconds:
        seen += count(next(batches))
    return seen / elapsed, seen / (time.process_time() - cpu)


def cold(make, samples, batch, count):
    """(samples per second, samples per CPU second) of one pass from the start of the loader.

    The very last batches are not included, because a shuffling loader may hold them back.
    """
    seen, start, cpu = 0, time.perf_counter(), time.process_time()
    batches = make()
    while seen < samples - batch:
        seen += count(next(batches))
    elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
    return seen / elapsed, seen / cpu, batches


def promises():
    """The table of guarantees as Markdown."""
    names = ["maskalign", *(name for name, _, _ in PEERS.values())]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {what} | " + " | ".join(row[name] for name in names) + " |" for what, row in PROMISES.items()]
    return "\n".join(lines)


def main(argv=None):
    """Write a peer's layout, verify it, or measure it and print the two rates as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=PEERS)
    parser.add_argument("action", choices=["write", "verify", "warm", "cold"])
    parser.add_argument("root")
    for option, default in (("--batch", 256), ("--workers", 0), ("--samples", 0), ("--seconds", 4.0)):
        parser.add_argument(option, type=type(default), default=default)
    options = parser.parse_args(argv)
    _, write, read = PEERS[options.name]
    folder = os.path.join(options.root, options.name)
    if options.action == "write":
        write(os.path.join(options.root, "shards"), folder)
        os.sync()
        return 0
    import torch

    torch.set_num_threads(1)
    import_module(LIBRARIES[options.name])  # before the clock starts, as for our loader
    if options.action == "verify":
        verify(os.path.join(options.root, "shards"), read(folder, options.batch, options.workers))
        rates = []
    elif options.action == "warm":
        batches = read(folder, options.batch, options.workers)
        rates = warm(batches, options.samples, options.batch, options.seconds, lambda parts: len(parts[-1]))
    else:
        drop_pages(folder)
        make = lambda: read(folder, options.batch, options.workers)  # noqa: E731
        *rates, _ = cold(make, options.samples, options.batch, lambda parts: len(parts[-1]))
    print(json.dumps(list(rates)), flush=True)
    for child in multiprocessing.active_children():  # otherwise they would keep the pipe of our output open
        child.kill()
    os._exit(0)  # threads of both libraries would delay the end of the interpreter


if __name__ == "__main__":
    sys.exit(main())
