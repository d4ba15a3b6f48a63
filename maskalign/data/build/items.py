"""The types of a source of images: `Item` and `Source`."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Item(NamedTuple):
    """One image: its name (for messages and the order), its label, and its position for the reader."""

    name: str
    label: int
    where: Any = None


@dataclass
class Source:
    """A listed source.

    Attributes:
        name: the origin in the manifest, without folders of this machine.
        class_names: label i is `class_names[i]`.
        items: the images, sorted by name.
        reader: function from an item to the file's bytes or a PIL image; picklable.
        license: license and attribution, None where unknown.
        rejected: (name, reason) of files that look like images but cannot be used.
        empty: folders that would be classes, but hold no image.
        identity: further text for the plan's fingerprint, in addition to the items.
        passed: Counter of skipped files of other kinds, by extension.
        notes: lines for the user, about how classes were determined and possible misunderstandings.
        how: the origin of the classes in a few words ("the top folders").
        takes_names: whether labels are numbers, for which the user may give names.
        subsets: whether --subset applies to this kind of source.
        photos: whether the images may have an EXIF orientation.
        latent: the manifest entry of latents that belong to the images, see `prepared`.
        size: side of the images in pixels, where all have one known size.
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
