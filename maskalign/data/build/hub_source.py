"""Hugging Face data sets as a source: a name on the hub, or a local folder that the package `datasets` can read."""

import os
from functools import lru_cache

from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import number_classes
from maskalign.errors import UsageError, one_line

LABELS = ("label", "labels", "cls", "class")


def open_hub(name, *, subset=None, class_names=None, holes=None):
    """List a data set of pictures and classes.

    Args:
        name: "USER/NAME[@REVISION]" on the hub, or a local folder (parquet, imagefolder).
        subset: the split; the default is train.
        class_names, holes: as for `labels.number_classes`, where labels are plain numbers.

    Raises:
        UsageError: the package is missing, the data set cannot be loaded, or it has no column of pictures or classes.
    """
    what = f"source hf:{name}"
    try:
        import datasets
    except ImportError as error:
        raise UsageError(f"{what} needs a package: pip install 'maskalign[hub]' ({one_line(error)[:100]})") from None
    subset = subset or "train"
    data = _load(name, subset)
    images = [column for column, kind in data.features.items() if isinstance(kind, datasets.Image)]
    image = "image" if "image" in images else images[0] if len(images) == 1 else None
    if image is None:
        there = ", ".join(data.features)
        raise UsageError(f"{what}: expected one column of pictures, or one called image; its columns are {there}")
    label = _label_column(data, datasets, what)
    kind = data.features[label]
    own = list(kind.names) if isinstance(kind, datasets.ClassLabel) and kind.names else None
    values = data[label][:]
    width = len(str(len(values)))
    rejected = [
        (f"{n:0{width}d}", "has no label") for n, value in enumerate(values) if value is None or own and value < 0
    ]
    without = {entry for entry, _ in rejected}
    numbered = [(f"{n:0{width}d}", value, n) for n, value in enumerate(values)]
    numbered = [entry for entry in numbered if entry[0] not in without]
    names, number_of, notes = number_classes(
        [value for _, value, _ in numbered],
        class_names or own,
        f"hf:{name}",
        "keep" if own and holes is None else holes,
    )
    items = [Item(entry, number_of(value), n) for entry, value, n in numbered]
    license = data.info.license or None
    return Source(
        f"hf {os.path.basename(os.path.abspath(name)) if os.path.isdir(name) else name} {subset}", names, items,
        HubReader(name, subset, image), license, rejected=rejected, notes=notes, how=f"the column {label}",
        takes_names=own is None, identity=f"{len(values)} {image} {label}",
    )  # fmt: skip


def _label_column(data, datasets, what):
    """The column of classes: the one of type ClassLabel, else one of integers or strings with a common name."""
    typed = [column for column, kind in data.features.items() if isinstance(kind, datasets.ClassLabel)]
    usual = [column for column in LABELS if column in (typed or data.features)]
    plain = [
        column for column in usual if getattr(data.features[column], "dtype", "").startswith(("int", "uint", "str"))
    ]
    if len(typed) == 1 or usual and usual[0] in typed:
        return usual[0] if usual else typed[0]
    if not typed and plain:
        return plain[0]
    many = f"several columns of classes ({', '.join(typed)})" if typed else "no column of classes"
    raise UsageError(f"{what}: {many}; expected one, or one called label; its columns are {', '.join(data.features)}")


class HubReader:
    """Returns the bytes of the image in row `item.where`. Picklable: each process opens the data set itself."""

    def __init__(self, name, subset, column):
        self.name, self.subset, self.column = name, subset, column

    def __call__(self, item):
        entry = _undecoded(self.name, self.subset, self.column)[item.where][self.column]
        if entry is None:
            raise ValueError("has no picture")
        if entry.get("bytes") is not None:
            return entry["bytes"]
        with open(entry["path"], "rb") as file:
            return file.read()


@lru_cache(maxsize=1)
def _undecoded(name, subset, column):
    import datasets

    return _load(name, subset).select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _load(name, subset):
    import datasets

    datasets.disable_progress_bars()
    what = f"source hf:{name}"
    place, _, revision = (name, "", "") if os.path.isdir(name) else name.partition("@")
    if not os.path.isdir(name) and (place.startswith((".", "/", "~")) or place.count("/") > 1):
        raise UsageError(f"{what}: no such folder, and not a name on the hub such as hf:USER/NAME")
    try:
        return datasets.load_dataset(place, split=subset, revision=revision or None)
    except Exception as error:  # no network, no such name or split, damaged files: each has its own error type
        reason = one_line(error)[:200]
        raise UsageError(f"{what}: cannot be loaded ({reason}); --subset is the split (default train)") from None
