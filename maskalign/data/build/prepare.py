"""One shard of a data set that is being built: read, prepare, write, record. Runs in any process."""

import json
import os
from dataclasses import asdict

from maskalign.data.build.images import PREPARE, decode_image, encode_image, is_as_stored, to_rgb, upright
from maskalign.data.format.tar_shards import write_shard
from maskalign.errors import one_line
from maskalign.runtime.files import write_atomically


def make_shard(reader, part, path, record_path, settings, advance=None):
    """Prepare the images of one shard and write it; the same arguments give the same bytes.

    Args:
        reader: of the `Source`. Where it has a method `members(item)`, that gives further members of the sample.
        part: [(key, item)].
        path: of the shard.
        record_path: a JSON file that is written when the shard is in place.
        settings: {"size", "crop", "image_format", "exif"} as `build` takes them.
        advance: called after each image.

    Returns:
        What the record says: {"shard": its manifest entry, "bad": [[name, reason]] of the images left out}.
    """
    bad = []
    samples = prepare(reader, part, bad, advance, **settings)
    shard = write_shard(path, samples, scratch=os.path.dirname(record_path))
    record = {"shard": asdict(shard), "bad": bad}
    write_atomically(record_path, json.dumps(record).encode())
    return record


def load(reader, item, exif):
    """One image of a source in mode RGB; raises whatever is wrong with it or with what belongs to it."""
    if hasattr(reader, "members"):
        reader.members(item)
    return to_image(reader(item), exif)


def to_image(image, exif):
    """What a reader gives, a file's bytes or a PIL image, as an image in mode RGB."""
    if isinstance(image, bytes):
        return decode_image(image, exif=exif)
    return upright(to_rgb(image), image) if exif == "apply" else to_rgb(image)


def prepare(reader, part, bad, advance, size, crop, image_format, exif):
    """Yield (key, members) of the usable images of a part; [name, reason] of the others is appended to `bad`."""
    for key, item in part:
        try:
            original = reader(item)
            image = to_image(original, exif)
            if getattr(reader, "as_is", False) and is_as_stored(original, size, image_format):
                data = original
            else:
                data = encode_image(PREPARE[crop](image, size), image_format)
            further = reader.members(item) if hasattr(reader, "members") else {}
        except Exception as error:  # whatever is wrong with one image, the others are still wanted
            bad.append([item.name, one_line(error)])
        else:
            yield key, {"cls": str(item.label).encode(), image_format: data} | further
        if advance:
            advance()
