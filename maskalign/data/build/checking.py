"""`maskalign data check`: compare every shard with the manifest, in parallel, in one sequential pass over each.

The checks are: the shard exists and has the size and SHA-256 of the manifest; the tar can be read; the number of
samples is right; and each sample has a valid label and every member that the manifest lists (an image of the right
size, features of the right shape and dtype). Nothing is unpickled: only the header of a .npy is parsed, and the values
of class tokens.
"""

import hashlib
import io
import os
import sys
import tarfile
from collections import Counter
from contextlib import closing
from typing import NamedTuple

from maskalign.data.build.processes import available_cores, in_processes
from maskalign.data.format.manifest import Manifest, class_member, is_url, teacher_member

SHOWN_PER_SHARD = 20


class Problem(NamedTuple):
    """An error in a shard (`key` is None) or in one sample of it."""

    shard: str
    key: str | None
    reason: str

    def __str__(self):
        return f"{self.shard}: {self.reason}" if self.key is None else f"{self.shard}: sample {self.key}: {self.reason}"


def check(path, *, workers=None, decode=False, quiet=False):
    """Verify a data set.

    Args:
        path: its folder or URL prefix.
        workers: number of processes; the default is one per CPU core. With 0 or 1, only this process.
        decode: decode every image completely, instead of reading only its header.
        quiet: no progress bar.

    Returns:
        List of `Problem`, in the order of the shards; empty if there is none.

    Raises:
        UsageError: there is no valid manifest.
    """
    from tqdm import tqdm

    manifest = Manifest.load(path)
    if workers is None:
        workers = 1 if manifest.bytes < 2**26 else available_cores()
    expected = _expected(manifest)
    tasks = [
        (number, manifest.shard_path(shard), shard, expected, decode) for number, shard in enumerate(manifest.shards)
    ]
    found, homes, twice = {}, {}, []
    results = in_processes(check_shard, tasks, min(workers, len(tasks)))
    with tqdm(total=len(tasks), unit="shard", desc="check", disable=True if quiet else None) as bar, closing(results):
        for number, problems, keys in results:
            found[number] = problems
            for key in keys:  # 64-bit hashes of the keys
                if homes.setdefault(key, number) != number:
                    twice.append(tuple(sorted((homes[key], number))))
            bar.update()
    for (first, second), count in sorted(Counter(twice).items()):
        name = manifest.shards[first].name
        found[second].append(Problem(manifest.shards[second].name, None, f"{count} keys are in {name} as well"))
    return [problem for number in sorted(found) for problem in found[number]]


def _expected(manifest):
    """The members that each sample must have: {"classes", "image": (extension, side) or None, "arrays"}.

    "arrays" is {member: (shape, dtype, whether its values must be finite)}.
    """
    arrays = {}
    if manifest.latent is not None:
        arrays["moments.npy"] = (tuple(manifest.latent["shape"]), manifest.latent["dtype"], False)
    for name, entry in manifest.teachers.items():
        arrays[f"{teacher_member(name)}.npy"] = ((entry["tokens"], entry["dim"]), entry["dtype"], False)
        if (class_token := entry.get("class_token")) is not None:
            arrays[class_member(name)] = ((class_token["dim"],), class_token["dtype"], True)
    if manifest.hflip:
        arrays |= {f"flip.{member}": form for member, form in arrays.items()}
    image = None if manifest.image_format is None else (manifest.image_format, manifest.resolution)
    return {"classes": manifest.num_classes, "image": image, "arrays": arrays}


def check_shard(number, path, shard, expected, decode=False):
    """(number, problems, 64-bit hashes of the keys) of one shard; `expected` as returned by `_expected`."""
    try:
        if is_url(path):
            import fsspec

            with fsspec.open(path, "rb") as file:
                return number, *_check_file(file, shard, expected, decode)
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            if size != shard.bytes:
                problem = Problem(shard.name, None, f"has {size:,} bytes, the manifest says {shard.bytes:,}")
                return number, [problem], []
            return number, *_check_file(file, shard, expected, decode)
    except FileNotFoundError:
        return number, [Problem(shard.name, None, "is missing")], []
    except OSError as error:
        return number, [Problem(shard.name, None, f"cannot be read ({error.strerror or error})")], []


def _check_file(file, shard, expected, decode):
    from maskalign.data.format.tar_shards import HashingReader, read_shard

    file = HashingReader(file)
    problems, keys, count = [], {}, 0
    try:
        for key, members in read_shard(file):
            count += 1
            if key in keys:
                problems.append(Problem(shard.name, key, "its key occurs twice"))
            keys[key] = int.from_bytes(hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest(), "big")
            problems += [Problem(shard.name, key, reason) for reason in _check_sample(members, expected, decode)]
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        problems.append(Problem(shard.name, None, f"is not a readable tar ({error})"))
    while file.read(2**20):  # to the end, for the checksum
        continue
    if len(problems) > SHOWN_PER_SHARD:
        more = len(problems) - SHOWN_PER_SHARD
        problems = [*problems[:SHOWN_PER_SHARD], Problem(shard.name, None, f"has {more} more bad samples")]
    if count != shard.num_samples:
        reason = f"holds {count:,} samples, the manifest says {shard.num_samples:,}"
        problems.insert(0, Problem(shard.name, None, reason))
    if file.bytes != shard.bytes:
        reason = f"has {file.bytes:,} bytes, the manifest says {shard.bytes:,}"
        problems.insert(0, Problem(shard.name, None, reason))
    elif file.sha256.hexdigest() != shard.sha256:
        problems.insert(0, Problem(shard.name, None, "its checksum is not the manifest's: the content has changed"))
    return problems, list(keys.values())


def _check_sample(members, expected, decode):
    """Yield a short description of each error in one sample."""
    label = members.get("cls")
    if label is None:
        yield "has no label (.cls)"
    elif not (label.strip().isdigit() and len(label) < 20 and int(label) < expected["classes"]):
        yield f"its label {label[:20]!r} is not in [0, {expected['classes']})"
    if expected["image"] is not None:
        yield from _check_image(members, *expected["image"], decode)
    if expected["arrays"]:
        from maskalign.data.format.npy import all_finite, npy_header
    for member, (shape, dtype, finite) in expected["arrays"].items():
        if member not in members:
            yield f"has no {member}"
            continue
        try:
            found = npy_header(members[member])
        except ValueError as error:
            yield f"{member} is not a plain .npy array ({error})"
            continue
        if found != (shape, dtype):
            yield f"{member} has shape {found[0]} and dtype {found[1]}, the manifest says {shape} and {dtype}"
        elif finite and not all_finite(members[member]):
            yield f"{member} holds numbers that are not finite"


def _check_image(members, ending, side, decode):
    from PIL import Image

    from maskalign.data.build.images import FORMATS, BadImage, decode_image

    if ending not in members:
        yield f"has no image (.{ending})"
        return
    try:
        if decode:
            size = decode_image(members[ending]).size
        else:
            size = Image.open(io.BytesIO(members[ending]), formats=FORMATS).size
    except BadImage as error:
        yield f"its image cannot be decoded ({error})"
    except Exception:  # a damaged header makes Pillow's plugins raise nearly any error
        yield "its image cannot be decoded (no valid header)"
    else:
        if size != (side, side):
            yield f"its image is {size[0]}x{size[1]}, the manifest says {side}x{side}"


def report(problems, path):
    """Print a list of problems, or that there are none; raises RunError if there are any."""
    from maskalign.errors import RunError

    manifest = Manifest.load(path)
    for problem in problems:
        print(str(problem).encode(sys.stdout.encoding or "ascii", "backslashreplace").decode(sys.stdout.encoding))
    if problems:
        bad = len({problem.shard for problem in problems})
        raise RunError(f"{path}: {bad:,} of {len(manifest.shards):,} shards are bad; build or copy them again")
    print(f"{path}: all {len(manifest.shards):,} shards are good, {manifest.num_samples:,} samples")
