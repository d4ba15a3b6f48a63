"""What an encoding shall add to every sample, and what that takes. Imports no torch and no numpy."""

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple

from maskalign.data.format.manifest import class_member, teacher_member
from maskalign.errors import UsageError
from maskalign.runtime.hub import check_hub

IMAGENET_IMAGES = 1_281_167  # ILSVRC 2012, training set


class Wanted(NamedTuple):
    """What to add of one teacher: its name, weights as for `load_teacher`, and whether rows and class tokens."""

    name: str
    weights: str | None
    rows: bool = True
    class_token: bool = True


@dataclass(frozen=True)
class Recipe:
    """What to add to every sample.

    Attributes:
        teachers: a `Wanted` for each.
        latents: VAE name or folder, or None.
        dtype: "int8" or "float16" of teacher tokens; moments are float16.
        grid: (gh, gw) to resample tokens to, or None.
        normalize: "none", "spatial" or "mean".
        hflip: the mirrored images as well.
        batch_size: images at a time.
        class_components: principal components of the class tokens to keep, 0 for none.
    """

    teachers: tuple
    latents: str | None
    dtype: str
    grid: tuple | None
    normalize: str
    hflip: bool
    batch_size: int
    class_components: int = 64

    @property
    def endings(self):
        """Endings of the members to add, in the order in which they are written."""
        plain = ["moments.npy"] if self.latents else []
        for teacher in self.teachers:
            plain += [f"{teacher_member(teacher.name)}.npy"] if teacher.rows else []
            plain += [class_member(teacher.name)] if teacher.class_token else []
        return plain + [f"flip.{ending}" for ending in plain] if self.hflip else plain

    def replaces(self, ending):
        """Whether an old member gives way: one of ours, its mirrored twin, or a class token that loses its rows."""
        plain = ending.removeprefix("flip.")
        return plain in self.endings or plain in [class_member(t.name) for t in self.teachers if t.rows]


def weights_label(weights):
    """What the manifest says of a teacher's weights: default, hub, random, or the file's name without its folder."""
    return "default" if weights is None else os.path.basename(weights)


def entry_bytes(entry):
    """Bytes that one more feature of a sample takes in a tar: header, .npy header, data, filled up to 512.

    Args:
        entry: a latent or teacher entry of the manifest (a teacher's rows alone), or {"shape", "dtype"}.
    """
    shape = entry.get("shape") or [entry["tokens"], entry["dim"]]
    size = 128 + math.prod(shape) * {"int8": 1, "float16": 2}[entry["dtype"]]
    return 512 + -(-size // 512) * 512


def check_vae(name):
    """Where diffusers finds a VAE: its folder, or its name on the hub; a UsageError where there is none. Quick."""
    if find_spec("diffusers") is None:
        raise UsageError("latents need a package: pip install diffusers (or pip install 'maskalign[latents]')")
    if os.path.isdir(name):
        for folder in (name, os.path.join(name, "vae")):
            if os.path.isfile(os.path.join(folder, "config.json")):
                return folder
        raise UsageError(f"vae {name}: the folder has no config.json; give one that save_pretrained wrote")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"vae {name}: no such folder, and no name on the hub, as stabilityai/sd-vae-ft-mse")
    check_hub("latents", name, "the VAE (a folder that save_pretrained wrote)")
    return name
