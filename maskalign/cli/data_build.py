"""`maskalign data build`."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Optional

from maskalign.cli.options import parse_options
from maskalign.config.option import option


@dataclass(kw_only=True)
class DataBuild:
    """Build a data set of webdataset shards from images.

    The command can be stopped at any moment; run it again to continue. Under torchrun the ranks share the work.
    """

    EXAMPLES = (
        "maskalign data build openmoji --out datasets/openmoji32",
        "maskalign data build photos/ --out datasets/photos64 --size 64",
        "maskalign data build repa_data --out datasets/imagenet256  # images/ and vae-sd/ are taken over as they are",
        "maskalign data build imagenet/train --out datasets/imagenet256 --size 256 --image-format webp",
    )

    source: str = option(positional=True, path=True)
    """openmoji, a folder or .zip/.tar of images (top folder = class, or dataset.json has the labels), a folder prepared
    for REPA or REG with its latents, webdataset shards (files or URLs), torchvision:NAME, or hf:NAME of a Hugging Face
    data set."""
    out: Path = option(metavar="DIR")
    """Folder for the shards and manifest.json."""
    size: Optional[int] = None
    """Side of the stored square images in pixels; by default 32, or that of pictures prepared for REPA or REG."""
    crop: Literal["adm", "resize"] = option("adm", group="images")
    """adm is ADM's center crop (as in REPA); resize squeezes the whole image into the square."""
    exif: Literal["apply", "ignore"] = option("apply", group="images")
    """apply rotates photos as their cameras say; ignore takes them as they are stored (ADM, REPA)."""
    image_format: Literal["png", "webp", "jpg"] = option("png", group="images")
    """Format of the stored images; png and webp are lossless."""
    max_bad_fraction: float = option(0.01, group="images")
    """Share of unusable images that is accepted; they are listed in bad.csv."""
    subset: Optional[str] = option(None, group="classes and parts")
    """Part of the source to take, e.g. train; required where the source has several."""
    class_folders: Optional[Literal["top", "leaf", "path", "none"]] = option(None, group="classes and parts")
    """The class of an image is its top folder (top, as in torchvision), the folder that holds it (leaf), all its
    folders (path), or there is only one class (none). By default the labels in dataset.json, else top."""
    class_names: Optional[Path] = option(None, group="classes and parts", metavar="FILE")
    """Text file with a class name per line, for webdataset shards or a dataset.json with integer labels."""
    holes: Optional[Literal["keep", "close"]] = option(None, group="classes and parts")
    """Keep numbers of classes that no image has as classes, or close the holes. By default such labels are refused,
    unless class names say what they are."""
    root: Optional[Path] = option(None, group="classes and parts", metavar="DIR")
    """Folder where torchvision has, or puts, its files."""
    license: Optional[str] = option(None, group="classes and parts", metavar="TEXT")
    """License of the images, for the manifest."""
    shard_size: Optional[int] = option(None, group="work")
    """Samples per shard; by default a 64th of the data set, between 64 and 2048."""
    workers: Optional[int] = option(None, group="work")
    """Processes; by default one per CPU core, and none besides this one for few images."""
    seed: int = option(0, group="work")
    """Seed of the order of the samples."""


SETTINGS = DataBuild


def run(argv, start):
    settings, _ = parse_options(DataBuild, "data build", argv)
    start()
    from maskalign.data.build.building import build, read_names

    options = asdict(settings)
    source, out, names = (options.pop(name) for name in ("source", "out", "class_names"))
    build(source, out, class_names=None if names is None else read_names(names), **options)
