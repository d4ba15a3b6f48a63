"""Write one shard of a data set that is being built: read and prepare its images, write the shard, write its record."""

import json
import os
from dataclasses import asdict

from maskalign.data.build.images import PREPARE, decode_image, encode_image, is_as_stored, to_rgb, upright
from maskalign.data.format.tar_shards import write_shard
from maskalign.errors import one_line
from maskalign.runtime.files import write_atomically


def make_shard(reader, part, path, record_path, settings, advance=None):
    """Prepare the images of one shard and write it. The same arguments give the same bytes.

    Args:
        reader: of the `Source`. If it has a method `members(item)`, this returns further members of the sample.
        part: [(key, item)].
        path: path of the shard.
        record_path: path of a JSON file, which is written after the shard.
        settings: {"size", "crop", "image_format", "exif"}, as for `build`.
        advance: called after each image, with the number of images since the last call.

    Returns:
        The content of the record: {"shard": its manifest entry, "bad": [[name, reason]] of skipped images}.
    """
    bad = []
    samples = prepare(reader, part, bad, advance, **settings)
    shard = write_shard(path, samples, scratch=os.path.dirname(record_path))
    record = {"shard": asdict(shard), "bad": bad}
    write_atomically(record_path, json.dumps(record).encode())
    return record


def load(reader, item, exif):
    """One image of a source in mode RGB. Raises an error if the image or a member that belongs to it is bad."""
    if hasattr(reader, "members"):
        reader.members(item)
    return to_image(reader(item), exif)


def to_image(image, exif):
    """Convert the result of a reader, a file's bytes or a PIL image, to an image in mode RGB."""
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
        except Exception as error:  # any error of one image must not stop the others
            bad.append([item.name, one_line(error)])
        else:
            yield key, {"cls": str(item.label).encode(), image_format: data} | further
        if advance:
            advance()
