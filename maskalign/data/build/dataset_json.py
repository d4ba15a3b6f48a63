"""The layout of EDM, StyleGAN and REPA: pictures in numbered folders, and a dataset.json with a label for each.

dataset.json is `{"labels": [["00000/img00000000.png", 3], ...]}`, with names relative to its folder, or
`{"labels": null}` where the pictures have no labels.
"""

import json
import math

from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import check_names, number_classes
from maskalign.data.build.listing import clean_name, has_image_ending
from maskalign.errors import UsageError, one_line

FILE = "dataset.json"
MAX_BYTES = 2**30
OTHERWISE = "give --class-folders none for one class, or top to use the folders as classes"


def find_tables(listing, subset=None):
    """Find the dataset.json files of a listing that have pictures below their folder.

    Args:
        listing: the `Listing`.
        subset: if given, files below a folder of this name are preferred.

    Returns:
        {folder: position}; the folder "" is the source itself.
    """
    places = {name.rpartition("/")[0]: place for name, place in listing.files if name.rpartition("/")[2] == FILE}
    if not places:
        return {}
    inside = f"/{subset.strip('/')}/" if subset else "/"
    above = set()
    for name, _ in listing.images:
        folder = name.rpartition("/")[0]
        while folder not in above:
            above.add(folder)
            folder = folder.rpartition("/")[0]
    full = {folder: place for folder, place in places.items() if folder in above}
    chosen = {folder: place for folder, place in full.items() if inside in f"/{folder}/"} or full
    # If the folder of a dataset.json lies inside that of another one, the outer one is used.
    return {
        folder: place
        for folder, place in chosen.items()
        if not any(other != folder and f"{folder}/".startswith(f"{other}/" if other else "") for other in chosen)
    }


def group_by_table(name, listing, reader, tables, *, subset, where, class_names, holes):
    """Make a Source from a listing whose pictures have their labels in dataset.json.

    Args:
        name, listing, reader, subset, where: as for `folders.group_by_class`.
        tables: the result of `find_tables`, not empty.
        class_names, holes: as for `labels.number_classes`.

    Raises:
        UsageError: there are several such files, or the file has no labels for these pictures.
    """
    if len(tables) > 1:
        parts = ", ".join(folder or "." for folder in sorted(tables)[:8])
        raise UsageError(
            f"source {where}: several folders have a dataset.json: {parts}; choose one with --subset, for example "
            f"--subset {sorted(tables)[-1]}"
        )
    ((folder, place),) = tables.items()
    what = f"source {where}: {folder}/{FILE}" if folder else f"source {where}: {FILE}"
    labels, own_names = read_table(reader, Item(f"{folder}/{FILE}" if folder else FILE, -1, place), what)
    return group_by_labels(
        name, listing, reader, labels, own_names, start=f"{folder}/" if folder else "", subset=subset, where=where,
        what=what, class_names=class_names, holes=holes,
    )  # fmt: skip


def group_by_labels(
    name, listing, reader, labels, own_names=None, *, start="", subset=None, where, what, class_names, holes
):
    """Make a Source from pictures and their labels.

    Args:
        labels: {path of a picture below `start`: label}.
        own_names: class names from the file of the labels, or None.
        start: the folder of the pictures with a trailing "/", or "" for the whole source.
        what: the origin of the labels, for messages.
        name, listing, reader, subset, where, class_names, holes: as for `group_by_table`.

    Raises:
        UsageError: no picture has a label, or a label is invalid.
    """
    found, rejected = [], [entry for entry in listing.rejected if entry[0].startswith(start)]
    named = set()
    for path, where_it_is in listing.images:
        if not path.startswith(start):
            if not subset:
                rejected.append((path, f"lies outside the folder of {FILE}"))
            continue
        label = labels.get(path[len(start) :])
        if label is None:
            rejected.append((path, f"has no label in {FILE}"))
            continue
        named.add(path[len(start) :])
        found.append((path, clean_label(label, path, what), where_it_is))
    if not found:
        example = next(iter(labels), "nothing")
        raise UsageError(
            f"{what} names none of the pictures found (it names {example!r}); remove it and {OTHERWISE}, or give the "
            "folder of the pictures that it belongs to"
        )
    refused = {path for path, _ in rejected}
    rejected += [
        (start + path, f"is named in {FILE}, but does not exist")
        for path in labels
        if path not in named and start + path not in refused and has_image_ending(path)
    ]
    names = class_names or own_names
    numbers = [label for _, label, _ in found]
    names, number_of, notes = number_classes(numbers, names, where, holes)
    items = sorted(Item(path, number_of(label), place) for path, label, place in found)
    name += f", {subset}" if subset else ""
    source = Source(name, names, items, reader, rejected=sorted(rejected), notes=notes, how=f"the labels in {FILE}")
    source.passed = listing.passed
    source.passed[".json"] -= 1
    source.passed += type(source.passed)()  # drops counts of 0
    source.takes_names = True
    return source


def read_table(reader, item, what, may_be_empty=False):
    """Read a dataset.json: ({clean name: label}, class names or None).

    Args:
        reader: returns the bytes of an item.
        item: the file.
        what: the file, for messages.
        may_be_empty: return {} where there are no labels, instead of raising an error.

    Raises:
        UsageError: the file is not valid.
    """
    try:
        data = json.loads(reader(item).decode("utf-8-sig"))
    except RecursionError:
        raise UsageError(f"{what} is not valid JSON of labels (nested too deeply); repair it, or remove it") from None
    except Exception as error:  # invalid UTF-8 or JSON, or a damaged member: zipfile raises nearly any error
        raise UsageError(f"{what} cannot be read ({one_line(error)}); repair it, or remove it") from None
    labels = data.get("labels") if isinstance(data, dict) else None
    if isinstance(labels, dict):
        labels = list(labels.items())
    if may_be_empty and not labels:
        return {}, None
    if labels is None or labels == []:
        raise UsageError(f"{what} has no labels; {OTHERWISE}")
    pairs = {}
    for entry in labels if isinstance(labels, list) else [labels]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], str):
            raise UsageError(
                f"{what}: its labels are not pairs of a name and a label (for example {str(entry)[:60]}); expected "
                '{"labels": [["00000/img00000000.png", 3], ...]}'
            )
        clean = clean_name(entry[0])
        if pairs.setdefault(clean, entry[1]) != entry[1]:
            raise UsageError(f"{what}: {entry[0]} has two labels, {pairs[clean]} and {entry[1]}; correct it")
    names = data.get("class_names")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return pairs, check_names(names, f"{what}: class_names")
    return pairs, None


def clean_label(label, path, what):
    """A label as an integer or a name (str). A one-hot vector gives the index of its 1. Raises UsageError otherwise."""
    if isinstance(label, list):
        ones = [number for number, value in enumerate(label) if value]
        if len(ones) == 1 and label[ones[0]] == 1:
            return ones[0]
    elif isinstance(label, str) and label.strip():
        return label.strip()
    elif isinstance(label, (int, float)) and not isinstance(label, bool) and math.isfinite(label):
        if label == int(label):
            return int(label)
    raise UsageError(
        f"{what}: the label of {path} is {str(label)[:60]}, which is neither a class number nor a name; only class "
        "labels are supported"
    )
