"""The features that an encoding adds to every sample, and their size. Imports neither torch nor numpy."""

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
    """The features to add of one teacher: name and weights as for `load_teacher`, and whether rows and class tokens."""

    name: str
    weights: str | None
    rows: bool = True
    class_token: bool = True


@dataclass(frozen=True)
class Recipe:
    """The features to add to every sample.

    Attributes:
        teachers: tuple with a `Wanted` for each teacher.
        latents: VAE name or folder, or None.
        dtype: dtype of teacher tokens, "int8" or "float16"; moments are float16.
        grid: (gh, gw) to which tokens are resampled, or None.
        normalize: "none", "spatial" or "mean".
        hflip: whether to add the features of the mirrored images too.
        batch_size: images per batch.
        class_components: number of principal components of the class tokens to store; 0 for none.
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
        """Extensions of the members to add, in the order in which they are written."""
        plain = ["moments.npy"] if self.latents else []
        for teacher in self.teachers:
            plain += [f"{teacher_member(teacher.name)}.npy"] if teacher.rows else []
            plain += [class_member(teacher.name)] if teacher.class_token else []
        return plain + [f"flip.{ending}" for ending in plain] if self.hflip else plain

    def replaces(self, ending):
        """Whether the old member with this extension is removed.

        These are the members that are written again, their mirrored versions, and class tokens of replaced rows.
        """
        plain = ending.removeprefix("flip.")
        return plain in self.endings or plain in [class_member(t.name) for t in self.teachers if t.rows]


def weights_label(weights):
    """A teacher's weights for the manifest: default, hub, random, or the file's name without its folder."""
    return "default" if weights is None else os.path.basename(weights)


def entry_bytes(entry):
    """Bytes of one more feature of a sample in a tar: tar header, .npy header and data, padded to a multiple of 512.

    Args:
        entry: a latent or teacher entry of the manifest (a teacher's rows alone), or {"shape", "dtype"}.
    """
    shape = entry.get("shape") or [entry["tokens"], entry["dim"]]
    size = 128 + math.prod(shape) * {"int8": 1, "float16": 2}[entry["dtype"]]
    return 512 + -(-size // 512) * 512


def check_vae(name):
    """Find a VAE for diffusers, without loading it: returns its folder, or its name on the hub.

    Raises:
        UsageError: diffusers is not installed, or there is no such VAE.
    """
    if find_spec("diffusers") is None:
        raise UsageError("latents need a package: pip install diffusers (or pip install 'maskalign[latents]')")
    if os.path.isdir(name):
        for folder in (name, os.path.join(name, "vae")):
            if os.path.isfile(os.path.join(folder, "config.json")):
                return folder
        raise UsageError(f"vae {name}: the folder has no config.json; give one that save_pretrained wrote")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UsageError(f"vae {name}: no such folder, and not a name on the hub such as stabilityai/sd-vae-ft-mse")
    check_hub("latents", name, "the VAE (a folder that save_pretrained wrote)")
    return name
