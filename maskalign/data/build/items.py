"""What a source of images is."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Item(NamedTuple):
    """One image: its name for messages and for the order, its label, and where the reader finds it."""

    name: str
    label: int
    where: Any = None


@dataclass
class Source:
    """A listed source.

    Attributes:
        name: what the manifest says about the origin; no folders of this machine.
        class_names: label i is `class_names[i]`.
        items: the images, sorted by name.
        reader: called with an item, gives the file's bytes or a PIL image; picklable.
        license: license and attribution, None where unknown.
        rejected: (name, reason) of what looked like an image but cannot be one of the data set.
        empty: folders that would be classes, but hold no image.
        identity: enters the plan's fingerprint, beside the items.
        passed: how many files of other kinds are skipped, by ending.
        notes: lines for the user: how classes were told, and what may be meant otherwise.
        how: where the classes are from, in a few words ("the top folders").
        takes_names: labels are numbers, for which the user may give names.
        subsets: --subset means something for this kind of source.
        photos: the images may say in EXIF how they are to be turned.
        latent: the manifest's entry of latents that come with the images, see `prepared`.
        size: side of images that come in one size, where that is known.
    """

    name: str
    class_names: list[str]
    items: list[Item]
    reader: Any
    license: str | None = None
    rejected: list[tuple[str, str]] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    identity: str = ""
    passed: Counter = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    how: str = ""
    takes_names: bool = False
    subsets: bool = True
    photos: bool = True
    latent: dict | None = None
    size: int | None = None
