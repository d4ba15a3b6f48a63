"""webdataset shards as a source: an image and its label (.cls, or .json with a label) in each sample."""

import glob
import json
import os
import re

from maskalign.data.archives import TarReader, list_tar
from maskalign.data.images import ENDINGS
from maskalign.data.items import Item, Source
from maskalign.data.manifest import FILE_NAME, Manifest
from maskalign.data.shards import split_name
from maskalign.errors import UsageError

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name")
MAX_LABEL_BYTES = 2**20
MAX_CLASSES = 1_000_000


def open_webdataset(source, class_names=None):
    """List the samples of webdataset shards without reading the images.

    Args:
        source: a folder with .tar files, one .tar, or a pattern: "shards/{000..009}.tar" or "shards/*.tar".
        class_names: names for integer labels. Where left out: those of the folder's manifest, else numbers.

    Returns:
        A `Source`; samples without a label or without an image are in its `rejected`.
    """
    paths, license = _find_shards(source), None
    if class_names is None and os.path.isfile(os.path.join(source, FILE_NAME)):
        manifest = Manifest.load(source)
        class_names, license = manifest.class_names, manifest.license
    reader = TarReader(paths)
    found, rejected = [], []
    for number, path in enumerate(paths):
        stem = os.path.basename(path)
        samples = {}
        for member, where in list_tar(path, number, depth=0):
            key, ending = split_name(member)
            if member.startswith("__"):  # webdataset's metadata, and our index
                continue
            if key.rpartition("/")[2].startswith("."):
                continue
            sample = samples.setdefault(key, {})
            last = ending.lower().rpartition(".")[2]
            if last in ENDINGS:
                sample.setdefault("image", where)
            elif ending in ("cls", "json"):
                sample[ending] = where
        for key, sample in samples.items():
            name = f"{stem}/{key}"
            try:
                if "image" not in sample:
                    raise ValueError("has no image")
                found.append((name, _read_label(reader, name, sample), sample["image"]))
            except ValueError as error:
                rejected.append((name, str(error)))
    names, number_of = _name_classes([label for _, label, _ in found], class_names, source)
    items = sorted(Item(name, number_of(label), where) for name, label, where in found)
    what = os.path.basename(os.path.abspath(source))
    total = sum(os.path.getsize(path) for path in paths)
    return Source(f"webdataset {what}", names, items, reader, license, sorted(rejected), f"{total} bytes")


def _find_shards(source):
    if os.path.isdir(source):
        paths = sorted(glob.glob(os.path.join(glob.escape(source), "*.tar")))
    else:
        paths = sorted(path for pattern in expand_braces(source) for path in glob.glob(pattern) or [pattern])
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise UsageError(f"source {source}: no shard {missing[0] if missing else '*.tar'} there")
    return paths


def expand_braces(pattern):
    """["a-00.tar", "a-01.tar"] of "a-{00..01}.tar": ranges of numbers, zero-padded as they are written."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if not match:
        return [pattern]
    first, last = match.groups()
    if int(last) - int(first) > 1_000_000:
        raise UsageError(f"source {pattern}: over a million shards")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return [
        full for number in numbers for full in expand_braces(pattern[: match.start()] + number + pattern[match.end() :])
    ]


def _read_label(reader, name, sample):
    """The label of a sample as an int or a class name; ValueError where it has none."""
    where = sample.get("cls") or sample.get("json")
    if where is None:
        raise ValueError("has no label (.cls or .json)")
    if where[2] > MAX_LABEL_BYTES:
        raise ValueError(f"its label has {where[2]:,} bytes")
    text = reader(Item(name, -1, where)).decode("utf-8").strip()
    if "cls" in sample:
        label = int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    else:
        label = json.loads(text)
        if isinstance(label, dict):
            label = next((label[key] for key in LABEL_KEYS if key in label), None)
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError("has no label (.json without " + ", ".join(LABEL_KEYS) + ")")
    return label


def _name_classes(labels, class_names, source):
    """(names, function from label to its number) for integer labels or class names."""
    texts = sorted({label for label in labels if isinstance(label, str)})
    numbers = [label for label in labels if isinstance(label, int)]
    if texts and numbers:
        raise UsageError(f"source {source}: some labels are numbers, others names (as {texts[0]!r})")
    if texts:
        names = texts if class_names is None else list(class_names)
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise UsageError(f"source {source}: label {unknown[0]!r} is not among the class names")
        return names, {text: number for number, text in enumerate(names)}.__getitem__
    low, high = min(numbers, default=0), max(numbers, default=0)
    limit = MAX_CLASSES if class_names is None else len(class_names)
    if low < 0 or high >= limit:
        wrong = low if low < 0 else high
        raise UsageError(f"source {source}: label {wrong} is outside [0, {limit}), the range of the classes")
    names = [str(number) for number in range(high + 1)] if class_names is None else list(class_names)
    return names, int
