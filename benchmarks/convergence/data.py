"""The data of `benchmarks.convergence`: a training and a held-out part with cached teacher features, built once."""

import os
from pathlib import Path

from maskalign.data.build import build, encode
from maskalign.data.format.manifest import FILE_NAME, Manifest
from maskalign.errors import UsageError

PARTS = ("train", "test")


def prepare(source, folder, teacher, *, size=32, images=None, heldout=None, quiet=False):
    """Build, split and encode a data set, or use the result of an earlier call.

    Args:
        source: a folder or archive of images, `openmoji`, `torchvision:NAME`, or the folder of a built data set. If it
            has no parts `train` and `test`, the last tenth of its shards is held out.
        folder: folder for the parts `folder/train` and `folder/test`.
        teacher: the teacher to encode with; rows are int8, minus the data set's mean token, with class tokens.
        size: side of the images in pixels.
        images: approximate number of training images (whole shards); None for all.
        heldout: the same for the held-out images.
        quiet: print no progress.

    Returns:
        (training folder, held-out folder), as strings.
    """
    folder = Path(folder)
    for part, most in zip(PARTS, (images, heldout), strict=True):
        target = folder / part
        if not (target / FILE_NAME).is_file():
            manifest, shards = _whole_part(source, folder, part, size, quiet)
            _cut(manifest, _first(shards, most), target)
    # The held-out part is not encoded. Its features are computed when they are used, minus the training mean token.
    entry = Manifest.load(str(folder / "train")).teachers.get(teacher)
    if entry is None:
        encode(str(folder / "train"), teacher=teacher, normalize="mean", quiet=quiet)
    elif "class_token" not in entry:  # encoded by an older version, without class tokens
        encode(str(folder / "train"), teacher=teacher, normalize="mean", class_token="only", quiet=quiet)
    return tuple(str(folder / part) for part in PARTS)


def _whole_part(source, folder, part, size, quiet):
    """(manifest, shards) of a part before it is cut to the requested number of images."""
    if (Path(source) / FILE_NAME).is_file():
        return _heldout_shards(Manifest.load(str(source)), part)
    whole = folder / f"whole-{part}"
    if not (whole / FILE_NAME).is_file() and not (folder / "whole" / FILE_NAME).is_file():
        try:
            build(source, str(whole), size=size, subset=part, quiet=quiet)
        except UsageError as error:
            if not any(words in str(error) for words in ("no subsets", "no images below")):
                raise
            build(source, str(folder / "whole"), size=size, quiet=quiet)
    if (whole / FILE_NAME).is_file():
        manifest = Manifest.load(str(whole))
        return manifest, manifest.shards
    return _heldout_shards(Manifest.load(str(folder / "whole")), part)


def _heldout_shards(manifest, part):
    """The shards of a part. The last tenth is held out; a built data set is shuffled, so any tenth could be used."""
    count = len(manifest.shards)
    if count < 2:
        raise UsageError(f"--data {manifest.root}: one shard cannot be split into training and held-out images")
    border = count - max(1, count // 10)
    return manifest, manifest.shards[:border] if part == "train" else manifest.shards[border:]


def _first(shards, most):
    """The first shards with at least `most` images in total; all shards for None."""
    kept, total = [], 0
    for shard in shards:
        if most is not None and total >= most:
            break
        kept.append(shard)
        total += shard.num_samples
    return kept


def _cut(manifest, shards, target):
    """Make a data set of links to some of another's shards. Encoding it does not change the other data set."""
    target.mkdir(parents=True, exist_ok=True)
    for shard in shards:
        link = target / shard.name
        link.unlink(missing_ok=True)
        try:
            os.link(manifest.shard_path(shard), link)
        except OSError:  # hard links do not work across file systems
            os.symlink(os.path.abspath(manifest.shard_path(shard)), link)
    manifest.shards, manifest.num_samples = shards, sum(shard.num_samples for shard in shards)
    manifest.save(target)
