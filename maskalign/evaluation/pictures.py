"""Images to evaluate, in batches: from a folder, an .npz in ADM's format or a data set."""

import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from maskalign.data.build.images import ENDINGS, BadImage, decode_image
from maskalign.data.build.listing import tell_passed, walk_folder
from maskalign.data.format.npy import read_header
from maskalign.errors import UsageError, one_line

ADM_FORM = "expected ADM's layout: arr_0, uint8, (images, height, width, 3)"


class PictureFolder:
    """The images below a folder in the order of their paths, found as by `maskalign data build`.

    Attributes:
        count: number of images.
        size: (height, width) of the first image; all images must have this size.
        passed: Counter of the skipped files by ending, and of hidden files.

    Raises:
        UsageError: there are no images, or one cannot be read, for example because of a broken link.
    """

    def __init__(self, root):
        self.root = Path(root)
        listing = walk_folder(root)
        self.passed = listing.passed
        self.paths = [self.root / (place or name) for name, place in listing.images]
        if not self.paths:
            passed = f" (but {tell_passed(self.passed)})" if self.passed else ""
            raise UsageError(
                f"{root} holds no pictures{passed} and is not a run; give a run or checkpoint of maskalign train, a "
                f"folder of pictures ({', '.join(ENDINGS)}), an .npz or a data set"
            )
        if listing.rejected:
            name, reason = listing.rejected[0]
            raise UsageError(f"{self.root / name}: {reason}; remove or replace it")
        self.count = len(self.paths)
        self.size = self._read(self.paths[0]).shape[:2]

    def _read(self, path):
        try:
            image = decode_image(path.read_bytes(), exif="apply")
        except OSError as error:
            raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
        except BadImage as error:
            raise UsageError(f"{path}: not a usable picture ({error}); remove or replace it") from None
        return np.asarray(image)

    def batches(self, size):
        """Yield (b, 3, H, W) uint8 tensors of up to `size` pictures.

        Raises:
            UsageError: a picture that cannot be read, or has another size than the first one.
        """
        with ThreadPoolExecutor(4) as pool:
            for begin in range(0, self.count, size):
                paths = self.paths[begin : begin + size]
                pictures = list(pool.map(self._read, paths))
                for path, picture in zip(paths, pictures, strict=True):
                    if picture.shape[:2] != self.size:
                        (height, width), (h, w) = self.size, picture.shape[:2]
                        raise UsageError(
                            f"{path} is {w}x{h}, {self.paths[0].name} is {width}x{height}; all pictures of a set must "
                            "have one size"
                        )
                yield torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


class PictureArchive:
    """The images in an .npz in the format of ADM's evaluator. They are read in batches, never as a whole.

    Raises:
        UsageError: the file is damaged, has no arr_0, or arr_0 does not hold uint8 images.
    """

    def __init__(self, path):
        self.path = Path(path)
        with self._open() as (file, shape, dtype):
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or not min(shape):
                raise UsageError(f"{path}: arr_0 is {self._describe(file, shape, dtype)}; {ADM_FORM}")
        self.count, self.size = shape[0], tuple(shape[1:3])

    def _open(self):
        return _OpenArray(self.path)

    @staticmethod
    def _describe(file, shape, dtype):
        words = f"{dtype} {tuple(shape)}"
        if dtype.kind == "f" and np.prod(shape) < 2**28:
            values = np.frombuffer(file.read(), dtype)
            bad = int((~np.isfinite(values)).sum())
            words += f" with {bad} numbers that are NaN or infinite" if bad else ""
        return words

    def batches(self, size):
        """Yield (b, 3, H, W) uint8 tensors of up to `size` pictures.

        Raises:
            UsageError: the file is damaged.
        """
        bytes_each = int(np.prod(self.size)) * 3
        with self._open() as (file, _, _):
            for begin in range(0, self.count, size):
                number = min(size, self.count - begin)
                data = bytearray(file.read(number * bytes_each))
                if len(data) < number * bytes_each:
                    raise UsageError(f"{self.path}: ends before its {self.count} pictures; write it again")
                pictures = torch.frombuffer(data, dtype=torch.uint8).view(number, *self.size, 3)
                yield pictures.permute(0, 3, 1, 2).contiguous()


class _OpenArray:
    """Context with (file positioned at the data, shape, dtype) of arr_0 in an .npz; damage raises a UsageError."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        self.archive = self.file = None
        try:
            self.archive = zipfile.ZipFile(self.path)
            names = self.archive.namelist()
            if "arr_0.npy" not in names:
                there = ", ".join(name.removesuffix(".npy") for name in names[:5]) or "nothing"
                raise UsageError(f"{self.path}: holds {there} and no arr_0; {ADM_FORM}")
            self.file = self.archive.open("arr_0.npy")
            shape, column_major, dtype = read_header(self.file)
            if dtype.hasobject:
                raise UsageError(f"{self.path}: arr_0 holds Python objects, which are never unpickled; {ADM_FORM}")
            if column_major:
                raise UsageError(f"{self.path}: arr_0 is column-major; save np.ascontiguousarray of it")
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self.file, shape, dtype

    def __exit__(self, kind, error, trace):
        for thing in (self.file, self.archive):
            if thing is not None:
                thing.close()
        if isinstance(error, UsageError) or not isinstance(error, Exception):
            return
        # zipfile, zlib and numpy's header parser each raise their own types of errors.
        reason = one_line(error)[:150]
        raise UsageError(f"{self.path}: not a readable .npz ({reason}); {ADM_FORM}") from None


class PictureDataSet:
    """The first images of a data set in the fixed order of its stream, with their labels.

    Args:
        path: folder or URL prefix.
        count: number of images; 0 for all.
        classes: use only images with these labels; None for all classes.

    Attributes:
        manifest: `Manifest` of the data set.
    """

    SEED = 0  # seed of the order; part of every cached reference's fingerprint

    def __init__(self, path, count=0, classes=None):
        from maskalign.data.format.manifest import Manifest

        self.classes = None if classes is None else sorted(set(classes))
        self.path, self.manifest = path, Manifest.load(path)
        if self.manifest.image_format is None:
            raise UsageError(f"{path}: holds no pictures (only latents or features), which the distances need")
        available = self.manifest.num_samples
        self.count = min(count, available) if count else available
        self.size = (self.manifest.resolution,) * 2
        self.labels = None

    def batches(self, size):
        """Yield (b, 3, H, W) uint8 tensors; `labels`, (count,) int64, is complete at the end."""
        from maskalign.data import ShardStream

        labels, left = [], self.count
        stream = ShardStream(self.path, size, seed=self.SEED, epochs=1, streams=1, fields=["image"])
        for batch in stream:
            pictures, own = batch["image"], batch["label"]
            if self.classes is not None:
                wanted = torch.isin(own, torch.tensor(self.classes))
                pictures, own = pictures[wanted], own[wanted]
            pictures = pictures[:left]
            labels.append(own[:left].clone())
            left -= len(pictures)
            if len(pictures):
                yield pictures
            if not left:
                break
        self.labels = torch.cat(labels)
        self.count = len(self.labels)  # bad images and other classes are not counted
