"""Folders written by REPA's and REG's preprocessing scripts: pictures, labels and latents are used unchanged.

    DIR/images/00000/img00000000.png            (REG: imagenet_256-vae) square pictures of one size
    DIR/images/dataset.json                     {"labels": [["00000/img00000000.png", 3], ...]}
    DIR/vae-sd/00000/img-mean-std-00000000.npy  (2C, h, w): mean and standard deviation of the VAE's posterior
    DIR/vae-sd/dataset.json                     the same labels with the names of the latents

The scripts number latents by the position of their picture in the sorted list of pictures. So latent k belongs to
picture k of that list, even if the encoding was interrupted.
"""

import io
import os
import re
from typing import Any

from maskalign.data.build.dataset_json import FILE, clean_label, group_by_labels, read_table
from maskalign.data.build.items import Item
from maskalign.data.format.npy import all_finite, npy_header
from maskalign.errors import UsageError, one_line

LATENT = re.compile(r"(?:(.*?)/)??(?:[0-9]{5}/)?img-mean-std-([0-9]{1,12})\.npy")
MAX_BYTES = 64 * 2**20
# The default VAE of REPA's and REG's scripts. Their files do not record which VAE was used.
VAE = "stabilityai/sd-vae-ft-mse"
SCALE, FACTOR = 0.18215, 8


class LatentReader:
    """Returns pictures like the source's reader, and the latents that belong to them; picklable.

    `members(item)` returns the further members of a sample, as {extension: bytes}.
    """

    as_is = True  # pictures that need no change are stored with the same bytes

    def __init__(self, reader, root, shape, dtype):
        self.reader, self.root, self.shape, self.dtype = reader, root, shape, dtype

    def __call__(self, item: Item) -> Any:
        return self.reader(item._replace(where=item.where[0]))

    def members(self, item):
        name = item.where[1]
        data = _read(os.path.join(self.root, name))
        try:
            found = npy_header(data)
            fine = found == (self.shape, self.dtype)
        except ValueError as error:
            raise ValueError(f"its latents {name} are not a plain .npy array ({error})") from None
        if not fine:
            raise ValueError(f"its latents {name} are {found[0]} {found[1]}, the others {self.shape} {self.dtype}")
        if not all_finite(data):
            raise ValueError(f"its latents {name} hold numbers that are not finite")
        return {"moments.npy": data}


def find_latents(listing):
    """The latents in a listing: {folder of the latents: {number: name}}. The folder "" is the source itself."""
    folders = {}
    for name, _ in listing.files:
        match = LATENT.fullmatch(name) if name.endswith(".npy") else None
        if match:
            folders.setdefault(match[1] or "", {})[int(match[2])] = name
    return folders


def take_latents(group, listing, reader, root, where, labels, size):
    """Make a Source of pictures with their latents from a prepared folder.

    Args:
        group: function without arguments that returns the `Source` of the pictures without latents, with labels from
            their dataset.json or folders.
        listing: the `Listing` of the folder.
        reader: the reader of its files.
        root: the path of the folder.
        where: the path for messages.
        labels: {"class_names", "holes"} as for `labels.number_classes`.
        size: the requested side in pixels, or None for that of the pictures.

    Returns:
        The `Source` with `latent` and `size`.

    Raises:
        UsageError: the latents have no pictures, or do not match them in number, labels or size.
    """
    folders = find_latents(listing)
    if len(folders) > 1:
        names = ", ".join(folder or "." for folder in sorted(folders))
        raise UsageError(f"source {where}: several folders hold latents ({names}); give a folder with only one of them")
    ((latent_folder, latents),) = folders.items()
    pictures = sorted(entry for entry in listing.images if not entry[0].startswith(f"{latent_folder}/"))
    if not pictures:
        raise UsageError(
            f"source {where}: found latents, but no pictures; put the folder of pictures beside "
            f"{latent_folder or 'them'}, as in the layout of REPA's scripts (images/ and vae-sd/)"
        )
    if max(latents) >= len(pictures):
        raise UsageError(
            f"source {where}: {latent_folder or '.'} has latents with the number {max(latents):,}, but there are only "
            f"{len(pictures):,} pictures; the latents do not belong to these pictures"
        )
    places = dict(listing.files)
    latent_labels = _labels_of(latents, latent_folder, places, reader, where)
    own = f"{pictures[0][0].split('/')[0]}/{FILE}"
    if latent_labels is not None and own not in places and FILE not in places:
        table = {pictures[number][0]: label for number, label in latent_labels.items()}
        found = group_by_labels(
            f"folder {os.path.basename(os.path.abspath(where))}", listing, reader, table, where=where,
            what=f"source {where}: {latent_folder}/{FILE}", **labels
        )  # fmt: skip
    else:
        found = group()
        _compare_labels(found, pictures, latent_labels, latent_folder, where)
    side, shape, dtype = _sizes(found, reader, root, pictures, latents, where)
    if size not in (None, side):
        raise UsageError(
            f"source {where}: its latents belong to pictures of {side} px, not {size}; omit --size, or give only the "
            "folder of the pictures"
        )
    latent_of = {pictures[number][0]: name for number, name in latents.items()}
    reason = f"has no latents in {latent_folder or '.'}"
    without = [(item.name, reason) for item in found.items if item.name not in latent_of]
    found.items = [
        item._replace(where=(item.where, latent_of[item.name])) for item in found.items if item.name in latent_of
    ]
    found.rejected = sorted([*found.rejected, *without])
    found.reader = LatentReader(found.reader, root, shape, dtype)
    found.latent = {"scale": SCALE, "bias": 0.0, "shape": list(shape), "dtype": dtype, "name": VAE}
    found.size, found.photos = side, False
    found.identity += f" {len(latents)} latents {shape} {dtype}"
    found.passed[".npy"] -= len(latents)
    found.passed[".json"] -= latent_labels is not None
    found.passed += type(found.passed)()  # drops counts of 0
    found.notes.append(
        f"using the latents in {latent_folder or 'the folder of the pictures'}; they do not record their VAE, so the "
        f"manifest names the default of REPA and REG, {VAE}"
    )
    return found


def _labels_of(latents, folder, places, reader, where):
    """{number: label} of the dataset.json beside the latents. None if there is no such file, or it has no labels."""
    name = f"{folder}/{FILE}" if folder else FILE
    if name not in places:
        return None
    what = f"source {where}: {name}"
    labels = read_table(reader, Item(name, -1, places[name]), what, may_be_empty=True)[0]
    if not labels:
        return None
    start = len(folder) + 1 if folder else 0
    found = {number: labels.get(latent[start:]) for number, latent in latents.items()}
    return {number: clean_label(label, latents[number], what) for number, label in found.items() if label is not None}


def _compare_labels(found, pictures, latent_labels, folder, where):
    """Check that the latents' labels, if there are any, match those of their pictures; raises UsageError."""
    if latent_labels is None:
        return
    place = {name: number for number, (name, _) in enumerate(pictures)}
    class_of = {}  # label of the latents -> class of the pictures
    for item in found.items:
        label = latent_labels.get(place[item.name])
        if label is not None and class_of.setdefault(label, item.label) != item.label:
            raise UsageError(
                f"source {where}: {item.name} has another label in {folder}/{FILE} than among the pictures: the "
                "latents do not belong to these pictures, or have another order"
            )
    if len(set(class_of.values())) < len(class_of):
        raise UsageError(f"source {where}: {folder}/{FILE} separates classes that are one class among the pictures")


def _sizes(found, reader, root, pictures, latents, where):
    """(side of the pictures, shape and dtype of the latents), from the first latent and its picture."""
    from PIL import Image

    number, name = min(latents.items())
    try:
        shape, dtype = npy_header(_read(os.path.join(root, name)))
    except (OSError, ValueError) as error:
        raise UsageError(f"source {where}: {name} cannot be read ({one_line(error)}); remove it") from None
    if len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or dtype not in ("float16", "float32"):
        raise UsageError(
            f"source {where}: {name} holds {dtype} of shape {shape}; expected mean and standard deviation, (2C, h, w)"
        )
    picture, place = pictures[number]
    try:
        with Image.open(io.BytesIO(reader(Item(picture, -1, place)))) as image:
            width, height = image.size
    except Exception as error:  # Pillow's plugins raise nearly any error
        raise UsageError(f"source {where}: {picture} cannot be read ({one_line(error)[:100]})") from None
    if (width, height) != (FACTOR * shape[1],) * 2:
        raise UsageError(
            f"source {where}: {picture} has {width} x {height} pixels, but latents of {shape[1]} x {shape[2]} belong "
            f"to pictures of {FACTOR * shape[1]}; the latents do not belong to these pictures"
        )
    return width, shape, dtype


def _read(path):
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f"{size:,} bytes, over the limit of {MAX_BYTES:,}")
    with open(path, "rb") as file:
        return file.read()
