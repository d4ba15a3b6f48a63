"""manifest.json: the contents of a data set, shard by shard. Imports neither torch nor numpy.

A data set is a folder (or URL prefix) of webdataset tar shards and this file. It is written last, so a folder with a
manifest is complete. A sample KEY has these members in its shard:

    KEY.cls                      the label, ASCII integer in [0, number of classes)
    KEY.png | KEY.jpg | KEY.webp the image, resolution x resolution RGB
    KEY.moments.npy              VAE moments (2C, h, w), mean then standard deviation
    KEY.<teacher>.npy            teacher tokens (tokens, dim), int8 or float16; the name is that of `teacher_member`
    KEY.<teacher>.class.npy      its class token (dim,), float16: a regression target, whose length matters
    KEY.flip.<member>            with hflip: the same member of the mirrored image, for moments and teachers
"""

import hashlib
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field, fields

from maskalign.data.format.http import open_http, refusal
from maskalign.data.format.members import KEY as MEMBER_CHECKSUMS
from maskalign.data.format.members import KIND as MEMBER_CHECKSUM_KIND
from maskalign.errors import RunError, UsageError, one_line
from maskalign.runtime.files import remove_leftovers, write_atomically
from maskalign.runtime.home import expand_home

FILE_NAME = "manifest.json"
VERSION = 1
IMAGE_FORMATS = ("png", "jpg", "webp")


@dataclass(frozen=True)
class Shard:
    """One tar file: its file name, number of samples, size in bytes and SHA-256 (64 hex digits)."""

    name: str
    num_samples: int
    bytes: int
    sha256: str


@dataclass
class Manifest:
    """The content of manifest.json, which a reader needs before it opens a shard.

    Attributes:
        num_samples: number of samples in all shards together.
        resolution: side of the (square) images in pixels.
        class_names: label i is `class_names[i]`.
        shards: the shards in the order of their names.
        image_format: "png", "jpg", "webp", or None where the shards hold no images.
        latent: None, or {"scale", "bias", "shape" [2C, h, w], "dtype", "name"}, and "mean" and "std" (C numbers each)
            where the moments are standardized per channel.
        teachers: name -> {"tokens", "dim", "grid" [gh, gw], "dtype", "normalize", ...}; other keys are kept. With class
            tokens also "class_token": {"dim", "dtype" "float16", "kind" "prefix" or "mean", "mean" [dim], "std" [dim],
            "components"}. "mean" and "std" are per channel; class tokens of the kind "mean" have been standardized with
            them. "components", which is optional, has the leading principal components of the stored class tokens:
            {"mean" [dim], "basis" [M][dim], "scale" [M], ...}, such that ((r - mean) @ basis.T) / scale is white.
        hflip: whether the shards also have the members of mirrored images.
        license: license and attribution of the images, None where unknown.
        source: the source from which the data set was built.
        extra: keys of the file that this class does not know, which are written back unchanged. In a new manifest they
            state that the members of shards have checksums (format/members.py).
        root: folder or URL prefix from which the manifest was read (not written).
    """

    num_samples: int
    resolution: int
    class_names: list[str]
    shards: list[Shard]
    image_format: str | None = "png"
    channels: int = 3
    latent: dict | None = None
    teachers: dict[str, dict] = field(default_factory=dict)
    hflip: bool = False
    license: str | None = None
    source: str = ""
    version: int = VERSION
    extra: dict = field(default_factory=lambda: {MEMBER_CHECKSUMS: MEMBER_CHECKSUM_KIND})
    root: str = ""

    @property
    def num_classes(self):
        return len(self.class_names)

    @property
    def bytes(self):
        """Size of all shards in bytes."""
        return sum(shard.bytes for shard in self.shards)

    def shard_path(self, shard):
        """Path or URL of a shard (a `Shard` or its number) under `root`."""
        shard = shard if isinstance(shard, Shard) else self.shards[shard]
        return f"{self.root}/{shard.name}" if is_url(self.root) else os.path.join(self.root, shard.name)

    def digest(self):
        """16 hex digits that identify the order of the samples on disk: encoding keeps it, a rebuild does not."""
        lines = "".join(f"{shard.name} {shard.num_samples}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode()).hexdigest()[:16]

    def validate(self, where="manifest"):
        """Check all fields and return self; raises UsageError with the first field that is invalid."""
        checks = [
            (self.version == VERSION, f"version is {self.version!r}, this program reads {VERSION}"),
            (_count(self.num_samples), f"num_samples is {self.num_samples!r}, not a count"),
            (
                _count(self.resolution, 1),
                f"resolution is {self.resolution!r}, not a positive number of pixels",
            ),
            (self.channels == 3, f"channels is {self.channels!r}, images here have 3"),
            (
                isinstance(self.class_names, list)
                and len(self.class_names) > 0
                and all(isinstance(name, str) for name in self.class_names)
                and len(set(self.class_names)) == len(self.class_names),
                "class_names is not a list of different names",
            ),
            (
                self.image_format is None or self.image_format in IMAGE_FORMATS,
                f"image_format is {self.image_format!r}, not one of {', '.join(IMAGE_FORMATS)} or null",
            ),
            (isinstance(self.hflip, bool), f"hflip is {self.hflip!r}, not true or false"),
            (self.license is None or isinstance(self.license, str), "license is not a string or null"),
            (isinstance(self.source, str), "source is not a string"),
        ]
        for fine, message in checks:
            _require(fine, where, message)
        self._validate_shards(where)
        self._validate_features(where)
        return self

    def _validate_shards(self, where):
        _require(isinstance(self.shards, list), where, "shards is not a list")
        names = set()
        for number, shard in enumerate(self.shards):
            what = f"shard {number}"
            _require(isinstance(shard, Shard), where, f"{what} is not a shard entry")
            plain = isinstance(shard.name, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", shard.name)
            # A name with a slash could lead a reader, or `data check`, out of the data set's folder.
            _require(plain, where, f"{what} has the name {shard.name!r}, which is not a plain file name")
            _require(shard.name not in names, where, f"{what} repeats the name {shard.name!r}")
            names.add(shard.name)
            _require(_count(shard.num_samples), where, f"{shard.name}: num_samples is {shard.num_samples!r}")
            _require(_count(shard.bytes), where, f"{shard.name}: bytes is {shard.bytes!r}")
            good = isinstance(shard.sha256, str) and re.fullmatch(r"[0-9a-f]{64}", shard.sha256)
            _require(good, where, f"{shard.name}: sha256 is not 64 hex digits")
        total = sum(shard.num_samples for shard in self.shards)
        _require(
            total == self.num_samples,
            where,
            f"num_samples is {self.num_samples}, but the shards add up to {total}",
        )

    def _validate_features(self, where):
        latent = self.latent
        if latent is not None:
            _require(isinstance(latent, dict), where, "latent is not an object or null")
            _require(_shape(latent.get("shape"), 3), where, "latent.shape is not [2C, h, w]")
            for key in ("scale", "bias"):
                number = isinstance(latent.get(key), (int, float)) and not isinstance(latent.get(key), bool)
                _require(number, where, f"latent.{key} is not a number")
            _require(latent.get("dtype") in ("float16", "float32"), where, "latent.dtype is not float16 or float32")
            for key in ("mean", "std") if "mean" in latent or "std" in latent else ():
                values, channels = latent.get(key), latent["shape"][0] // 2
                fine = isinstance(values, list) and len(values) == channels
                fine = fine and all(isinstance(value, (int, float)) and value == value for value in values)
                fine = fine and (key == "mean" or min(values) > 0)
                _require(fine, where, f"latent.{key} is not {channels} numbers, one per channel")
        _require(isinstance(self.teachers, dict), where, "teachers is not an object")
        taken = {"moments": "the VAE moments", "cls": "the label", "flip": "mirrored members"}
        for name, entry in self.teachers.items():
            _require(isinstance(entry, dict), where, f"teacher {name} is not an object")
            _require(_count(entry.get("tokens"), 1), where, f"teacher {name}: tokens is not a count")
            _require(_count(entry.get("dim"), 1), where, f"teacher {name}: dim is not a count")
            grid = entry.get("grid")
            fits = _shape(grid, 2) and grid[0] * grid[1] == entry["tokens"]
            _require(fits, where, f"teacher {name}: grid {grid} does not have {entry['tokens']} tokens")
            _require(
                entry.get("dtype") in ("int8", "float16"),
                where,
                f"teacher {name}: dtype is not int8 or float16",
            )
            member = teacher_member(name)
            _require(
                member not in taken,
                where,
                f"teacher {name} would share its file name with {taken.get(member)}",
            )
            taken[member] = f"teacher {name}"
            if "class_token" in entry:
                message = class_token_fault(entry["class_token"], entry["dim"])
                _require(message is None, where, f"teacher {name}: class_token {message}")

    def to_json(self):
        """The text of manifest.json. Keys have a fixed order, so equal data sets give equal bytes."""
        data = {"version": self.version}
        for key in KEYS:
            value = getattr(self, key)
            data[key] = [asdict(shard) for shard in value] if key == "shards" else value
        return json.dumps(data | self.extra, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder):
        """Write `folder`/manifest.json atomically and return its path. Only one process may write it at a time."""
        self.validate(os.path.join(str(folder), FILE_NAME))
        path = os.path.join(str(folder), FILE_NAME)
        remove_leftovers(path)
        write_atomically(path, self.to_json().encode())
        return path

    @classmethod
    def load(cls, path, timeout=30.0):
        """Read the manifest of a data set.

        Args:
            path: its folder, its URL prefix (http(s):// or any other that fsspec supports), or manifest.json itself.
            timeout: seconds that one attempt over http(s) may take.

        Raises:
            UsageError: there is no manifest, or it is not valid.
            RunError: a server does not answer after several attempts.
        """
        path = expand_home(os.fspath(path))
        if path.startswith("pipe:"):
            raise UsageError(f"data set {path!r}: pipe: commands are refused; give a folder or a URL")
        root = path.removesuffix(FILE_NAME) if os.path.basename(path) == FILE_NAME else path
        root = root.rstrip("/") or ("/" if path.startswith("/") else ".")
        text = _read_url(f"{root}/{FILE_NAME}", timeout) if is_url(root) else _read_local(root)
        manifest = cls.from_json(text, f"{root}/{FILE_NAME}")
        manifest.root = root
        return manifest

    @classmethod
    def from_json(cls, text, where=FILE_NAME):
        """Parse and validate the text of a manifest.json; `where` is its name in error messages."""
        try:
            data = json.loads(text)
        except ValueError as error:  # also for invalid UTF-8
            raise UsageError(f"{where}: not valid JSON ({error}); build the data set again") from None
        _require(isinstance(data, dict), where, "not a JSON object")
        version = data.pop("version", None)
        newer = isinstance(version, int) and version > VERSION
        mend = "update maskalign" if newer else "build the data set again"
        _require(version == VERSION, where, f"version is {version!r}, this program reads {VERSION}", mend)
        for key in ("num_samples", "resolution", "class_names", "shards"):
            _require(key in data, where, f"{key} is missing")
        _require(isinstance(data["shards"], list), where, "shards is not a list")
        known = {key: data.pop(key) for key in KEYS if key in data}
        try:
            known["shards"] = [
                Shard(**{key: entry[key] for key in ("name", "num_samples", "bytes", "sha256")})
                for entry in known["shards"]
            ]
        except (TypeError, KeyError) as error:
            raise UsageError(
                f"{where}: a shard is not an object with name, num_samples, bytes and sha256 ({error}); "
                "build the data set again"
            ) from None
        return cls(**known, extra=data).validate(where)


KEYS = tuple(item.name for item in fields(Manifest) if item.name not in ("version", "extra", "root"))


def other_classes(names, others):
    """A short description of how two lists of class names differ. None if they are equal, or one is unknown (None)."""
    if names is None or others is None or names == others:
        return None
    if len(names) != len(others):
        return f"{len(names)} and {len(others)} classes"
    label = next(number for number, (a, b) in enumerate(zip(names, others, strict=True)) if a != b)
    order = "the same names in another order, " if sorted(names) == sorted(others) else ""
    return f"{order}label {label} is {names[label]!r} and {others[label]!r}"


def teacher_member(teacher):
    """The name of a teacher in a member's file name: dots, colons and slashes become "-"."""
    return re.sub(r"[^A-Za-z0-9_-]", "-", teacher)


def class_member(teacher):
    """The extension of the member with a teacher's class token."""
    return f"{teacher_member(teacher)}.class.npy"


def class_token_fault(entry, dim):
    """The error in a manifest's `class_token` entry of a teacher whose rows have `dim` numbers, or None.

    The class token must have the width of the rows, because the model aligns it like a row.
    """
    if not isinstance(entry, dict):
        return "is not an object"
    if entry.get("dim") != dim or isinstance(entry.get("dim"), bool):
        return f"has dim {entry.get('dim')!r}, the rows have {dim}"
    if entry.get("dtype") != "float16":
        return f"has dtype {entry.get('dtype')!r}, not float16"
    if entry.get("kind") not in ("prefix", "mean"):
        return f"has kind {entry.get('kind')!r}, not prefix or mean"
    for key in ("mean", "std"):
        if (key in entry or entry["kind"] == "mean") and not _numbers(entry.get(key), dim, positive=key == "std"):
            return f"has no usable {key} of {dim} numbers"
    components = entry.get("components")
    if components is None:
        return None
    if not isinstance(components, dict):
        return "has components that are not an object"
    basis = components.get("basis")
    fine = isinstance(basis, list) and 1 <= len(basis) <= dim and all(_numbers(row, dim) for row in basis)
    fine = fine and _numbers(components.get("mean"), dim)
    fine = fine and _numbers(components.get("scale"), len(basis), positive=True)
    return None if fine else f"has components that are not mean [{dim}], basis [M][{dim}] and scale [M]"


def is_url(path):
    """Whether a path names a remote object (http://, s3://, gs://, memory://...) and not a local file."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def _require(fine, where, message, mend="build the data set again, or repair the file"):
    if not fine:
        raise UsageError(f"{where}: {message}; {mend}")


def _count(value, least=0):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _numbers(value, count, positive=False):
    """Whether `value` is a list of `count` finite numbers, all above 0 with `positive`."""
    return (
        isinstance(value, list)
        and len(value) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in value)
        and (not positive or min(value, default=1) > 0)
    )


def _shape(value, rank):
    return isinstance(value, (list, tuple)) and len(value) == rank and all(_count(side, 1) for side in value)


def _read_local(root):
    path = os.path.join(root, FILE_NAME)
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        what = "has no manifest.json" if os.path.isdir(root) else "does not exist"
        raise UsageError(f"data set {root} {what}; create it with: maskalign data build SOURCE --out {root}") from None
    except OSError as error:
        raise UsageError(f"data set {root}: cannot read manifest.json ({error.strerror})") from None


def _read_url(url, timeout, tries=4):
    for attempt in range(tries):
        try:
            if url.startswith(("http://", "https://")):
                with open_http(url, timeout) as answer:
                    return answer.read()
            import fsspec  # slow to import, and only object stores need it

            with fsspec.open(url, "rb") as file:
                return file.read()
        except (ValueError, ImportError) as error:  # fsspec does not know the scheme, or its package is not installed
            raise UsageError(f"data set {url}: {one_line(error)}") from None
        except OSError as error:
            status = getattr(error, "code", None)
            if isinstance(error, FileNotFoundError) or status in (401, 403, 404, 410):
                reason = refusal(status) if status in (401, 403) else one_line(error)
                raise UsageError(f"data set {url}: not found ({reason}); check the address") from None
            if attempt == tries - 1:
                raise RunError(f"data set {url}: no answer after {tries} attempts ({one_line(error)})") from None
            time.sleep(0.25 * 2**attempt)
