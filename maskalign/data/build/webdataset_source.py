"""Tars as a source: webdataset shards, where each sample has an image and its label, or tars of class folders.

A tar is a webdataset shard if its samples have an image and a label (.cls, or .json with a label) under one key.
"""

import glob
import json
import os
import re

from maskalign.data.build.archives import TarReader, list_tar
from maskalign.data.build.folders import group_by_class
from maskalign.data.build.images import ENDINGS
from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import number_classes
from maskalign.data.build.listing import Listing, ending_of, has_image_ending
from maskalign.data.format.manifest import FILE_NAME, Manifest
from maskalign.data.format.members import split_name
from maskalign.errors import UsageError

LABEL_KEYS = ("label", "cls", "class", "class_id", "class_name")
MAX_LABEL_BYTES = 2**20
LOOKED_AT = 20  # how many .json files of a tar are searched for a label


def open_tars(source, paths, *, class_names=None, holes=None, subset=None, class_folders=None, stem=None, first=None):
    """List tars without reading the images.

    Args:
        source: the source as given by the user: a folder with .tar files, one .tar, or a pattern.
        paths: paths of the tars. In a folder of class tars, each is named after its class.
        class_names: names for integer labels. The default is those of the folder's manifest, else the numbers.
        holes: see `labels.number_classes`.
        subset, class_folders: see `folders.group_by_class`; for tars of class folders.
        stem: the source's name without its extension, if it is one file.
        first: the `Listing` of the first tar, if it is known already.

    Returns:
        A `Source`; samples without a label or without an image are in its `rejected`.
    """
    reader = TarReader(paths)
    known = {} if first is None else {0: first}
    for number, path in enumerate(paths):
        known = known if number in known else {number: list_tar(path, number)}  # keeps one of maybe thousands
        if known[number].images:
            break
    sample = next(iter(known.values()))
    shards = class_folders is None and bool(sample.images) and _are_shards(sample, reader)
    listings = (known.get(number) or list_tar(path, number) for number, path in enumerate(paths))
    what = os.path.basename(os.path.abspath(source))
    identity = f"{sum(os.path.getsize(path) for path in paths)} bytes"
    if shards:
        if class_names is None and os.path.isfile(os.path.join(source, FILE_NAME)):
            manifest = Manifest.load(source)
            own_names, license = manifest.class_names, manifest.license
        else:
            own_names, license = class_names, None
        found = _group_by_key(source, what, paths, listings, reader, own_names, holes)
        found.license = license
    else:
        one = os.path.isfile(source)
        together = Listing()
        for path, listing in zip(paths, listings, strict=True):
            below = "" if one else f"{_stem(path, source)}/"
            together.files += [(below + name, place) for name, place in listing.files]
            together.rejected += [(below + name, reason) for name, reason in listing.rejected]
            together.folders += [below + name for name in listing.folders] + ([] if one else [below.rstrip("/")])
            together.hidden += listing.hidden
        name = f"archive {what}" if one else f"folder {what}"
        found = group_by_class(
            name, together, reader, subset=subset, where=source, class_folders=class_folders, stem=stem
        )
    found.identity = identity
    return found


def _stem(path, source):
    """The folder name for the images of one of several tars: its path in the source's folder, without .tar."""
    inside = os.path.relpath(path, source) if os.path.isdir(source) else os.path.basename(path)
    return inside[: -len(".tar")] if inside.lower().endswith(".tar") else inside


def _are_shards(listing, reader):
    """Whether most images of a tar share their key with a label."""
    samples, strays = _samples(listing)
    labeled = [sample for sample in samples.values() if sample.images and sample.labels]
    if 2 * len(labeled) < len(listing.images) - len(strays):
        return False
    if any("cls" in sample.labels for sample in labeled):
        return True
    for sample in labeled[:LOOKED_AT]:
        try:
            _read_label(reader, "", sample)
            return True
        except ValueError:
            continue
    return False


class _Sample:
    """The members under one key.

    Attributes:
        images, labels: {extension: position}.
        names: the names of all images, including those with the same extension.
        fault: the reason why the sample cannot be used, or None.
    """

    def __init__(self):
        self.images, self.labels, self.names, self.fault = {}, {}, [], None

    def add(self, name, ending, place):
        group = self.images if ending in ENDINGS else self.labels
        if ending in group:
            self.fault = f"its key has two .{ending}"
        group[ending] = place
        if ending in ENDINGS:
            self.names.append(name)


def _samples(listing):
    """({key: _Sample} of all images and labels, names of additional pictures of samples that have an image).

    A key ends at the first dot of the file's name, as in webdataset. For names with more dots, such as 2021.05.01.png,
    the key ends at the last dot if there is a label with this key. Otherwise they are additional pictures of the sample
    (0001.mask.png).
    """
    samples, dotted, labels = {}, [], set()
    for name, place in listing.files:
        if name.startswith("__"):  # webdataset's metadata, and the index of our shards
            continue
        key, ending = split_name(name)
        if key is None:
            continue
        ending = ending.lower()
        if ending in ENDINGS or ending in ("cls", "json"):
            samples.setdefault(key, _Sample()).add(name, ending, place)
        elif (last := ending.rpartition(".")[2]) in ENDINGS or last in ("cls", "json"):
            dotted.append((name[: -len(last) - 1], last, key, place, name))
            if last not in ENDINGS:
                labels.add(name[: -len(last) - 1])
    strays = []
    for long_key, ending, key, place, name in dotted:
        if long_key in labels:
            samples.setdefault(long_key, _Sample()).add(name, ending, place)
        elif ending in ENDINGS:
            strays.append((name, key, place, ending))
    # A picture such as 0001.left.png is the image of sample 0001 if it has no other one.
    further, alone = [], {}
    for name, key, place, ending in strays:
        if key in samples and samples[key].images:
            further.append(name)
        else:
            alone.setdefault(key, []).append((name, place, ending))
    for key, pictures in alone.items():
        if key in samples and samples[key].labels:
            for name, place, ending in pictures:
                samples[key].images = {}  # several images: none is used
                samples[key].add(name, ending, place)
            if len(pictures) > 1:
                names = ", ".join(name.rpartition("/")[2] for name, _, _ in pictures)
                samples[key].fault = f"its sample has several images ({names})"
        else:
            for name, place, ending in pictures:
                samples.setdefault(name[: -len(ending) - 1], _Sample()).add(name, ending, place)
    return samples, further


def _group_by_key(source, what, paths, listings, reader, class_names, holes):
    found, rejected, hidden, passed = [], [], 0, Listing().passed
    for path, listing in zip(paths, listings, strict=True):
        stem = os.path.basename(path)
        samples, further = _samples(listing)
        rejected += [(f"{stem}/{name}", reason) for name, reason in listing.rejected]
        hidden += listing.hidden
        for name in further:
            passed["." + split_name(name)[1].lower()] += 1
        for name, _ in listing.files:
            ending = ending_of(name)
            if not has_image_ending(name) and not name.startswith("__") and ending not in (".cls", ".json"):
                passed[ending] += 1
        for key, sample in samples.items():
            name = f"{stem}/{key}"
            try:
                if sample.fault:
                    raise ValueError(sample.fault)
                if not sample.images:
                    if "cls" not in sample.labels:  # a .json alone may be about anything
                        passed[".json"] += 1
                        continue
                    raise ValueError("has no image")
                if len(sample.images) > 1:
                    raise ValueError(f"its sample has several images (.{', .'.join(sample.images)})")
                (place,) = sample.images.values()
                found.append((name, _read_label(reader, name, sample), place))
            except ValueError as error:
                several = len(sample.names) > 1
                rejected += [(f"{stem}/{member}" if several else name, str(error)) for member in sample.names or [key]]
    if hidden:
        passed["hidden"] += hidden
    names, number_of, notes = number_classes([label for _, label, _ in found], class_names, source, holes)
    items = sorted(Item(name, number_of(label), place) for name, label, place in found)
    how = "the samples' labels"
    return Source(
        f"webdataset {what}", names, items, reader, rejected=sorted(rejected), notes=notes, passed=passed, how=how,
        takes_names=True, subsets=False,
    )  # fmt: skip


def find_shards(source):
    """The paths of the tars that match a pattern; raises UsageError if one does not exist."""
    paths = sorted(path for pattern in expand_braces(source) for path in glob.glob(pattern) or [pattern])
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        raise UsageError(f"source {source}: no such shard: {missing[0] if missing else '*.tar'}")
    return paths


def expand_braces(pattern):
    """Expand ranges of numbers: "a-{00..01}.tar" gives ["a-00.tar", "a-01.tar"], with the same zero padding."""
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
    """The label of a sample as an int or a class name; raises ValueError if it has none."""
    where = sample.labels.get("cls") or sample.labels.get("json")
    if where is None:
        raise ValueError("has no label (.cls or .json)")
    if where[2] > MAX_LABEL_BYTES:
        raise ValueError(f"its label has {where[2]:,} bytes")
    text = reader(Item(name, -1, where)).decode("utf-8").strip()
    if "cls" in sample.labels:
        label = int(text) if re.fullmatch(r"-?[0-9]{1,9}", text) else text
    else:
        try:
            label = json.loads(text)
        except RecursionError:
            raise ValueError("its .json is nested too deeply") from None
        if isinstance(label, dict):
            label = next((label[key] for key in LABEL_KEYS if key in label), None)
        if isinstance(label, float) and label.is_integer():
            label = int(label)
    if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
        raise ValueError("has no label (.json without " + ", ".join(LABEL_KEYS) + ")")
    return label
