"""torchvision data sets as a source: downloaded by torchvision, or found in its folder."""

import inspect
import os
from functools import lru_cache

from maskalign.data.build.items import Item, Source
from maskalign.data.build.labels import number_classes
from maskalign.errors import UsageError, one_line


def open_torchvision(name, subset=None, root=None):
    """List a labeled torchvision data set.

    Args:
        name: a class of torchvision.datasets, such as "CIFAR10".
        subset: "train" (default), "test" or a value of its `split` argument.
        root: folder of its files; the default is ~/.cache/maskalign/torchvision.

    Raises:
        UsageError: there is no such class, files are missing and cannot be downloaded, or labels are not integers.
    """
    root = os.path.expanduser(root or "~/.cache/maskalign/torchvision")
    dataset = _construct(name, subset or "train", root, True)
    labels = _labels(name, dataset)
    names = _names(dataset, max(labels, default=0) + 1)
    outside = [label for label in labels if not 0 <= label < len(names)]
    if outside:
        raise UsageError(f"source torchvision:{name}: label {outside[0]} is outside [0, {len(names)})")
    width = len(str(len(labels)))
    items = [Item(f"{number:0{width}d}", label, number) for number, label in enumerate(labels)]
    reader = TorchvisionReader(name, subset or "train", root)
    _, _, notes = number_classes(labels, names, f"torchvision:{name}")
    return Source(
        f"torchvision {name} {subset or 'train'}", names, items, reader, notes=notes, how="torchvision's labels"
    )


def _names(dataset, count):
    """The class names of torchvision, made distinct where several are equal (ImageNet has two classes "crane")."""
    names = getattr(dataset, "classes", None) or range(count)
    names = [", ".join(map(str, name)) if isinstance(name, tuple) else str(name) for name in names]
    twice = {name for name in names if names.count(name) > 1}
    marks = getattr(dataset, "wnids", None) or range(len(names))
    return [f"{name} ({mark})" if name in twice else name for name, mark in zip(names, marks, strict=False)]


class TorchvisionReader:
    """Returns image number `item.where` of the data set. Picklable: each process constructs the data set itself."""

    def __init__(self, name, subset, root):
        self.name, self.subset, self.root = name, subset, root

    def __call__(self, item):
        image = _cached(self.name, self.subset, self.root)[item.where][0]
        if not hasattr(image, "convert"):
            raise ValueError(f"is {type(image).__name__}, not an image")
        return image


@lru_cache(maxsize=1)
def _cached(name, subset, root):
    return _construct(name, subset, root, False)


def _construct(name, subset, root, download):
    what = f"source torchvision:{name}"
    try:
        import torchvision.datasets as datasets
    except ImportError as error:
        raise UsageError(f"{what} needs torchvision: pip install torchvision ({error})") from None
    kind = getattr(datasets, name, None)
    if not inspect.isclass(kind) or not name[:1].isupper():
        from difflib import get_close_matches

        near = get_close_matches(name, datasets.__all__, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"{what}: torchvision has no such data set{hint}")
    accepted = inspect.signature(kind).parameters
    arguments = {}
    if "root" in accepted:
        arguments["root"] = root
    if "train" in accepted:
        if subset not in ("train", "test"):
            raise UsageError(f"{what} has the subsets train and test, not {subset!r}")
        arguments["train"] = subset == "train"
    elif "split" in accepted:
        arguments["split"] = subset
    if "download" in accepted:
        arguments["download"] = download
    try:
        if "root" in arguments:
            os.makedirs(root, exist_ok=True)
        return kind(**arguments)
    except Exception as error:  # URLError, RuntimeError, ValueError, TypeError: classes raise different errors
        reason = one_line(error)[:200]
        raise UsageError(
            f"{what}: is not available ({reason}); it needs a network, or its files in {root} (or --root)"
        ) from None


def _labels(name, dataset):
    labels = None
    for attribute in ("targets", "_labels", "labels"):
        labels = getattr(dataset, attribute, None)
        if labels is not None and len(labels) == len(dataset):
            break
    else:
        labels = [dataset[number][1] for number in range(len(dataset))]  # slow, because it decodes the images
    try:
        return [int(label) for label in labels]
    except (TypeError, ValueError):
        raise UsageError(f"source torchvision:{name} has no integer class labels") from None
