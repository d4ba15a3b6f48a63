"""The properties of the data set that a plan needs, from its manifest or assumed. Imports no torch.

If the data set does not exist, ImageNet-256 is assumed, for which the recipes are written (see the README).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Optional, Tuple

from maskalign.config import as_schedule, model_sizes, validate_with_data
from maskalign.config.teacher_names import parse_teachers
from maskalign.data.build.recipe import IMAGENET_IMAGES
from maskalign.data.format.manifest import Manifest
from maskalign.errors import UsageError

IMAGENET_CLASSES = 1000
LATENT_CHANNELS, LATENT_STRIDE = 4, 8  # sd-vae-ft-mse


@dataclass
class Facts:
    """Properties of the data set.

    Attributes:
        input_size, in_channels, num_classes: of the model's input.
        image_size: side in pixels of the images from which latents and features are computed.
        latent: whether the input is drawn from stored moments of a VAE.
        images: number of training images.
        teachers: (name, cached) of every teacher with which the model is aligned; empty if the alignment weight is
            always 0.
        teacher_dims: {name: width of the tokens} of cached teachers in the manifest.
        teacher_bytes: {name: bytes per element of the stored tokens} of cached teachers.
        class_token: (name of the teacher whose class token is denoised, cached), or None.
        class_dim: width of the model's class token, if the settings or the manifest define it.
        assumed: the assumptions, one line each.
    """

    input_size: int
    in_channels: int
    num_classes: int
    image_size: int
    latent: bool
    images: int
    teachers: List[Tuple[str, bool]]
    teacher_dims: dict = field(default_factory=dict)
    teacher_bytes: dict = field(default_factory=dict)
    class_token: Optional[Tuple[str, bool]] = None
    class_dim: Optional[int] = None
    assumed: List[str] = field(default_factory=list)


def find_facts(config, image_size=None, num_classes=None):
    """The `Facts` of `data.path` if it is a local data set, else of ImageNet latents.

    Args:
        config: `Config`.
        image_size, num_classes: used instead of the assumed values.

    Raises:
        UsageError: the settings do not match the data set, or sizes are given for a data set that exists.
    """
    where = config.data.path
    paths = [Path(path) for path in ([where] if isinstance(where, str) else where)]
    if all((path / "manifest.json").is_file() for path in paths):
        if image_size is not None or num_classes is not None:
            raise UsageError(f"--image-size, --num-classes: the manifest of {paths[0]} defines both; omit them")
        return _read(config, [Manifest.load(str(path)) for path in paths])
    num_classes = IMAGENET_CLASSES if num_classes is None else num_classes
    return _assume(config, _size_in_name(paths[0].name) if image_size is None else image_size, num_classes)


def _size_in_name(name):
    """The resolution at the end of a data set's name, such as 512 for `imagenet512`; 256 if there is none."""
    found = re.search(r"(?<!\d)(64|128|256|512|1024)$", name)
    return int(found[1]) if found else 256


def _read(config, manifests):
    manifest, images = manifests[0], sum(one.num_samples for one in manifests)
    found = validate_with_data(config, manifest, **({"num_samples": images} if len(manifests) > 1 else {}))
    latent = manifest.latent is not None
    cached = {name: entry for name, entry in manifest.teachers.items() if (name, True) in found.teachers}
    class_token = found.class_token
    class_dim = config.model.class_token_dim
    if class_token is not None and class_dim is None and class_token[1]:
        class_dim = manifest.teachers[class_token[0]]["class_token"]["dim"]
    return Facts(
        input_size=found.input_size,
        in_channels=found.in_channels,
        num_classes=found.num_classes,
        image_size=manifest.resolution or found.input_size * LATENT_STRIDE,
        latent=latent,
        images=images,
        teachers=found.teachers,
        teacher_dims={name: entry["dim"] for name, entry in cached.items()},
        teacher_bytes={name: 1 if entry.get("dtype") == "int8" else 2 for name, entry in cached.items()},
        class_token=class_token,
        class_dim=class_dim,
    )


def _assume(config, image_size, num_classes):
    if image_size < LATENT_STRIDE or image_size % LATENT_STRIDE:
        raise UsageError(f"--image-size: {image_size} must be a multiple of {LATENT_STRIDE}, the VAE's stride")
    if num_classes < 1:
        raise UsageError(f"--num-classes: {num_classes} must be at least 1")
    size, patch = image_size // LATENT_STRIDE, model_sizes(config)["patch_size"]
    if size % patch:
        raise UsageError(f"model.patch_size: {patch} must divide the latents' size {size}")
    weight = as_schedule(config.method.align_weight)
    named, aligns = parse_teachers(config.teacher.names or ["dinov2-b"]), max(weight.ends) > 0
    names = named if aligns else []
    cached = config.teacher.mode != "online"
    assumed = [
        f"{_spelled(config.data.path)} not exist: ImageNet is assumed, {IMAGENET_IMAGES:,} images of {image_size} px, "
        f"{num_classes} classes, as latents of sd-vae-ft-mse, {LATENT_CHANNELS} x {size} x {size}"
    ]
    if names:
        how = "cached as int8" if cached else "computed in the loop"
        assumed.append(f"features of {', '.join(names)} are {how}")
    class_token = (named[0], cached) if config.model.class_token else None
    if class_token:
        how = "cached as float16" if cached else "computed in the loop"
        assumed.append(f"class tokens of {named[0]} are {how}")
    return Facts(
        input_size=size,
        in_channels=LATENT_CHANNELS,
        num_classes=num_classes,
        image_size=image_size,
        latent=True,
        images=IMAGENET_IMAGES,
        teachers=[(name, cached) for name in names],
        teacher_bytes=dict.fromkeys(names, 1) if cached else {},
        class_token=class_token,
        class_dim=config.model.class_token_dim,
        assumed=assumed,
    )


def _spelled(path):
    return f"{path} does" if isinstance(path, str) else f"{', '.join(path)} do"
