"""Samples per second of the data loader, compared with webdataset's own pipeline and REPA's one file per sample.

    python -m benchmarks.loader [--out DIR] [--samples N] [--seconds S] [--workers 0 2] [--layouts ...]
        [--peers streaming grain --streaming-python .venv-streaming/bin/python]

There are two layouts with random content. `latents` has the data of ImageNet at 256 px in training (moments 8x32x32
float16 and 256x768 int8 teacher tokens, no image). `pixels` has 64 px PNG images with 64x320 int8 tokens. The same
samples are in shards (read by our loader, and by webdataset's pipeline: shuffle, decode, batch) and in a folder with
one file per sample and kind, as in REPA's data set, read by a torch Dataset and DataLoader. "REPA's data set" is the
output of its own preprocessing: a 256 px PNG, from which features are computed in the loop, and float32 moments.

Warm: measured after one pass over the data; the median of the runs, which take turns. Cold: the files' pages are
dropped with posix_fadvise first, then one pass is timed from the start of the loader to its last batch. (Folder entries
and inodes stay cached, which favors one file per sample.) Our loader verifies the checksum of each sample when a
process first reads it, which is in the cold pass and rarely in the warm ones; the other loaders verify nothing. Samples
per CPU second are measured with the loader's own CPU time, which depends little on other programs on the machine, and
only without workers.

Peers (MosaicML Streaming, Grain) read the same latents from their own layouts, see loader_peers.py. Each of their runs
is a separate process, whose clock starts at the same point. `--promises` prints the guarantees of each loader.
"""

import argparse
import csv
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile

import numpy as np
import torch

from benchmarks import loader_peers
from maskalign.data import Manifest, ShardStream
from maskalign.data.format.tar_shards import shard_name, write_shard

BATCH = 256
CLASSES = 1000
TEACHERS = {"latents": ("dinov2-b", 256, 768, [16, 16]), "pixels": ("efficientnet-lite0", 64, 320, [8, 8])}


def members(layout, number, rng):
    """The members of one sample: ending -> bytes."""
    _, tokens, dim, _ = TEACHERS[layout]
    made = {"cls": str(number % CLASSES).encode()}
    if layout == "pixels":
        from PIL import Image

        # A coarse pattern with some noise, because noise does not compress, and flat color compresses too well.
        coarse = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        noisy = (coarse // 2 + rng.integers(0, 16, coarse.shape, dtype=np.uint8)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(noisy).save(file, "png")
        made["png"] = file.getvalue()
    else:
        made["moments.npy"] = npy(rng.standard_normal((8, 32, 32), dtype=np.float32).astype(np.float16))
    made[f"{TEACHERS[layout][0]}.npy"] = npy(rng.integers(-127, 128, (tokens, dim), dtype=np.int8))
    return made


def repa_members(variety=64):
    """Members of a sample as in the output of REPA's preprocessing: the 256 px image and float32 moments."""
    from PIL import Image

    rng, made = np.random.default_rng(1), []
    for _ in range(variety):
        coarse = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        file = io.BytesIO()
        noisy = coarse // 2 + rng.integers(0, 8, coarse.shape, dtype=np.uint8)
        Image.fromarray(noisy.astype(np.uint8)).save(file, "png")
        moments = npy(rng.standard_normal((8, 32, 32), dtype=np.float32))
        made.append({"png": file.getvalue(), "moments.npy": moments})
    return made


def npy(array):
    """The bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def build(layout, root, samples, per_shard=512):
    """Write samples as shards (root/shards) and as single files (root/files); returns bytes per sample."""
    rng = np.random.default_rng(0)
    shards, files, labels, size = os.path.join(root, "shards"), os.path.join(root, "files"), {}, 0
    os.makedirs(shards)
    written = []

    def content(first, last):
        nonlocal size
        for number in range(first, last):
            key, made = f"{number:08d}", members(layout, number, rng)
            folder = os.path.join(files, key[:5])
            os.makedirs(folder, exist_ok=True)
            labels[key] = number % CLASSES
            for ending, data in made.items():
                if ending != "cls":
                    size += len(data)
                    with open(os.path.join(folder, f"{key}.{ending}"), "wb") as file:
                        file.write(data)
            yield key, made

    for number, first in enumerate(range(0, samples, per_shard)):
        path = os.path.join(shards, shard_name(number))
        written.append(write_shard(path, content(first, min(first + per_shard, samples))))
    folders = [files]
    if layout == "latents":
        folders.append(os.path.join(root, "repa"))
        variety = repa_members()
        for number, key in enumerate(labels):
            folder = os.path.join(folders[1], key[:5])
            os.makedirs(folder, exist_ok=True)
            for ending, data in variety[number % len(variety)].items():
                with open(os.path.join(folder, f"{key}.{ending}"), "wb") as file:
                    file.write(data)
    for folder in folders:
        with open(os.path.join(folder, "dataset.json"), "w") as file:
            json.dump({"labels": labels}, file)
    name, tokens, dim, grid = TEACHERS[layout]
    teacher = {"tokens": tokens, "dim": dim, "grid": grid, "dtype": "int8", "normalize": "none"}
    latent = {"scale": 0.18215, "bias": 0.0, "shape": [8, 32, 32], "dtype": "float16", "name": "random"}
    Manifest(
        num_samples=samples,
        resolution=64 if layout == "pixels" else 256,
        class_names=[str(i) for i in range(CLASSES)],
        shards=written,
        image_format="png" if layout == "pixels" else None,
        latent=None if layout == "pixels" else latent,
        teachers={name: teacher},
        source="benchmark",
    ).save(shards)
    os.sync()
    return size / samples


class OneFilePerSample(torch.utils.data.Dataset):
    """REPA's layout of a data set: one file per sample and kind of content, and labels in a JSON file.

    Args:
        root: the folder.
        first, second: endings of the two files of a sample.
    """

    def __init__(self, root, first, second):
        with open(os.path.join(root, "dataset.json")) as file:
            self.labels = sorted(json.load(file)["labels"].items())
        self.root, self.first, self.second = root, first, second

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        key, label = self.labels[index]
        path = os.path.join(self.root, key[:5], key)
        if self.first == "png":
            from PIL import Image

            with Image.open(f"{path}.png") as image:
                content = torch.from_numpy(np.array(image).transpose(2, 0, 1))
        else:
            content = torch.from_numpy(np.load(f"{path}.{self.first}"))
        return content, torch.from_numpy(np.load(f"{path}.{self.second}")), torch.tensor(label)


def ours(root, layout, workers):
    """Endless batches of ShardStream."""
    return ShardStream(os.path.join(root, "shards"), BATCH, num_workers=workers)


def webdataset(root, layout, workers):
    """Endless batches of webdataset's pipeline: shuffle, decode, batch."""
    import webdataset as wds

    folder = os.path.join(root, "shards")
    urls = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tar"))
    data = wds.WebDataset(urls, resampled=True, shardshuffle=False, nodesplitter=wds.split_by_node).shuffle(1000)
    first = "png" if layout == "pixels" else "moments.npy"
    data = data.decode("torchrgb8").to_tuple(first, f"{TEACHERS[layout][0]}.npy", "cls").batched(BATCH)
    return wds.WebLoader(data, batch_size=None, num_workers=workers)


def one_file(root, layout, workers):
    """The same content as the shards, one file per sample and kind."""
    first = "png" if layout == "pixels" else "moments.npy"
    return files_loader(os.path.join(root, "files"), first, f"{TEACHERS[layout][0]}.npy", workers)


def repa(root, layout, workers):
    """Endless batches of what REPA reads: the image, from which features are computed in the loop, and the moments."""
    return files_loader(os.path.join(root, "repa"), "png", "moments.npy", workers)


def files_loader(folder, first, second, workers):
    """Endless epochs of a folder of files."""
    data = OneFilePerSample(folder, first, second)
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    while True:
        yield from loader


LOADERS = {
    "latents": {
        "maskalign": ours,
        "webdataset": webdataset,
        "one file per sample": one_file,
        "REPA's data set": repa,
    },
    "pixels": {"maskalign": ours, "webdataset": webdataset, "one file per sample": one_file},
}


def count(batch):
    """Samples in a batch of any of the loaders."""
    return len(batch["label"]) if isinstance(batch, dict) else len(batch[-1])


def warm_rate(make, root, layout, workers, samples, seconds):
    """(samples per second, samples per CPU second) of a running loader, measured for about `seconds`."""
    batches = iter(make(root, layout, workers))
    rates = loader_peers.warm(batches, samples, BATCH, seconds, count)
    if hasattr(batches, "close"):
        batches.close()
    return rates


def cold_rate(make, root, layout, workers, samples):
    """As `warm_rate`, for one pass over data that are not in the page cache, from the start of the loader."""
    loader_peers.drop_pages(root)
    *rates, batches = loader_peers.cold(lambda: iter(make(root, layout, workers)), samples, BATCH, count)
    if hasattr(batches, "close"):
        batches.close()
    return tuple(rates)


class Peer:
    """A loader of another library. It runs in a separate process with an interpreter that has the library.

    Args:
        name: key of `loader_peers.PEERS`.
        python: path of the interpreter.
    """

    def __init__(self, name, python):
        self.name, self.python, self.title = name, python, loader_peers.PEERS[name][0]

    def write(self, root):
        """Write the samples in root/shards in the peer's layout, and check that its loader returns these samples."""
        self._run("write", root)
        self._run("verify", root)

    def warm_rate(self, root, workers, samples, seconds):
        """As `warm_rate`."""
        return self._run("warm", root, "--workers", workers, "--samples", samples, "--seconds", seconds)

    def cold_rate(self, root, workers, samples):
        """As `cold_rate`."""
        return self._run("cold", root, "--workers", workers, "--samples", samples)

    def _run(self, action, root, *options):
        words = [self.python, loader_peers.__file__, self.name, action, root, "--batch", BATCH, *options]
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
            raise SystemExit(f"{self.title} ({self.python}) cannot {action}: {lines[-1]}")
        return None if action == "write" else tuple(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(layout, root, samples, workers, seconds, rounds, peers=()):
    """Rows of the table for one layout."""
    size = build(layout, root, samples)
    peers = peers if layout == "latents" else ()
    for peer in peers:
        peer.write(root)
    loaders, rows = LOADERS[layout] | {peer.title: peer for peer in peers}, []
    for number in workers:
        warm, cold = {name: [] for name in loaders}, {name: [] for name in loaders}
        for _ in range(rounds):  # the loaders take turns, so that other programs on the machine affect all equally
            for name, make in loaders.items():
                if isinstance(make, Peer):
                    warm[name].append(make.warm_rate(root, number, samples, seconds))
                else:
                    warm[name].append(warm_rate(make, root, layout, number, samples, seconds))
        for _ in range(rounds):
            for name, make in loaders.items():
                if isinstance(make, Peer):
                    cold[name].append(make.cold_rate(root, number, samples))
                else:
                    cold[name].append(cold_rate(make, root, layout, number, samples))
        rates = {
            name: [statistics.median(values) for runs in (warm, cold) for values in zip(*runs[name], strict=True)]
            for name in loaders
        }
        for name in loaders:
            faster = [ours / other for ours, other in zip(rates["maskalign"], rates[name], strict=True)]
            rows.append(
                {
                    "layout": layout,
                    "loader": name,
                    "workers": number,
                    "warm_samples_per_second": round(rates[name][0]),
                    "warm_gb_per_second": round(rates[name][0] * size / 1e9, 3),
                    "maskalign_times_as_fast_warm": round(faster[0], 2),
                    "samples_per_cpu_second": "" if number else round(rates[name][1]),
                    "maskalign_times_as_fast_per_cpu": "" if number else round(faster[1], 2),
                    "cold_samples_per_second": round(rates[name][2]),
                    "maskalign_times_as_fast_cold": round(faster[2], 2),
                    "cold_samples_per_cpu_second": "" if number else round(rates[name][3]),
                    "maskalign_times_as_fast_per_cpu_cold": "" if number else round(faster[3], 2),
                    "bytes_per_sample": round(size),
                    "cores": len(os.sched_getaffinity(0)),
                }
            )
            print_row(rows[-1])
    return rows


def print_row(row):
    """One line of the table."""
    print(
        f"{row['layout']:<8} {row['loader']:<20} {row['workers']:>7} {row['warm_samples_per_second']:>8} "
        f"{row['warm_gb_per_second']:>7.2f} {row['maskalign_times_as_fast_warm']:>7} "
        f"{row['samples_per_cpu_second']:>9} {row['maskalign_times_as_fast_per_cpu']:>7} "
        f"{row['cold_samples_per_second']:>9} {row['maskalign_times_as_fast_cold']:>7} "
        f"{row['cold_samples_per_cpu_second']:>9} {row['maskalign_times_as_fast_per_cpu_cold']:>7}",
        flush=True,
    )


def main(argv=None):
    """Measure, print the table and write loader.csv."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="benchmarks/results", help="folder for loader.csv")
    parser.add_argument("--samples", type=int, default=4096, help="samples in the data set")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a warm run")
    parser.add_argument("--rounds", type=int, default=3, help="runs of which the median is reported")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="loader processes")
    parser.add_argument("--layouts", nargs="+", default=list(TEACHERS), choices=list(TEACHERS))
    parser.add_argument("--scratch", default=None, help="folder on the disk to measure")
    parser.add_argument("--peers", nargs="*", default=[], choices=list(loader_peers.PEERS), help="other libraries")
    parser.add_argument("--streaming-python", default=sys.executable, help="interpreter that has mosaicml-streaming")
    parser.add_argument("--grain-python", default=sys.executable, help="interpreter that has grain")
    parser.add_argument("--promises", action="store_true", help="only print the guarantees of each loader")
    options = parser.parse_args(argv)
    if options.promises:
        print(loader_peers.promises())
        return 0
    peers = [Peer(name, getattr(options, f"{name}_python")) for name in options.peers]
    if options.samples < 2 * BATCH:
        parser.error(f"--samples {options.samples}: give at least {2 * BATCH}")
    torch.set_num_threads(1)
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {len(os.sched_getaffinity(0))} cores, torch {torch.__version__}")
    print(
        f"{'':<37} {'warm':>8} {'warm':>7} {'ours/':>7} {'per CPU':>9} {'ours/':>7} {'cold':>9} {'ours/':>7} "
        f"{'per CPU':>9} {'ours/':>7}"
    )
    print(f"{'layout   loader':<29} {'workers':>7} {'1/s':>8} {'GB/s':>7}", end=" ")
    print(f"{'it':>7} {'s':>9} {'it':>7} {'1/s':>9} {'it':>7} {'s':>9} {'it':>7}")
    rows = []
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(dir=options.scratch) as root:
            rows += measure(layout, root, options.samples, options.workers, options.seconds, options.rounds, peers)
    os.makedirs(options.out, exist_ok=True)
    path = os.path.join(options.out, "loader.csv")
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
