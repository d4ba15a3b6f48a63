"""Small data sets for the tests of the stream, written by webdataset's own writer: an independent truth."""

import hashlib
import io
import json
import os

import numpy as np
import pytest
from PIL import Image


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def image_bytes(pixels, kind="png"):
    file = io.BytesIO()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 98, "subsampling": 0}}.get(kind, {})
    Image.fromarray(pixels).save(file, {"jpg": "jpeg"}.get(kind, kind), **options)
    return file.getvalue()


def write_manifest(folder, shards, **changes):
    """manifest.json by the format's description, not by our code."""
    entries = []
    for name, count in shards:
        with open(os.path.join(folder, name), "rb") as file:
            data = file.read()
        digest = hashlib.sha256(data).hexdigest()
        entries.append({"name": name, "num_samples": count, "bytes": len(data), "sha256": digest})
    manifest = {
        "version": 1,
        "num_samples": sum(count for _, count in shards),
        "resolution": 8,
        "channels": 3,
        "class_names": ["a", "b", "c", "d", "e"],
        "shards": entries,
        "image_format": "png",
        "latent": None,
        "teachers": {"lite:2": {"tokens": 4, "dim": 6, "grid": [2, 2], "dtype": "int8", "normalize": "none"}},
        "hflip": False,
        "license": None,
        "source": "a test",
    }
    with open(os.path.join(folder, "manifest.json"), "w") as file:
        json.dump(manifest | changes, file)


@pytest.fixture
def make_shards(tmp_path):
    """make(counts, ...) -> (folder, truth): shards with so many samples, and key -> what it holds."""

    def make(
        counts,
        *,
        name="set",
        image="png",
        latent=False,
        hflip=False,
        first=0,
        checksums=False,
        change=None,
        **more,
    ):
        import webdataset

        from maskalign.data.format.tar_shards import write_shard

        folder = tmp_path / name
        folder.mkdir()
        draw, truth, shards, number = np.random.default_rng(len(counts)), {}, [], first
        for place, count in enumerate(counts):
            samples = []
            for _ in range(count):
                key = f"{number:08d}"
                pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                tokens = draw.integers(-127, 128, (2, 4, 6), dtype=np.int8)
                moments = draw.standard_normal((2, 8, 2, 2)).astype(np.float16)
                label = int(draw.integers(5))
                truth[key] = {"label": label, "image": pixels, "lite:2": tokens[0], "shard": place}
                members = {"cls": str(label).encode()}
                if image:
                    members[image] = image_bytes(pixels, image)
                members["lite-2.npy"] = npy_bytes(tokens[0])
                if latent:
                    truth[key]["moments"] = moments[0]
                    members["moments.npy"] = npy_bytes(moments[0])
                if hflip:
                    truth[key] |= {"flip lite:2": tokens[1], "flip moments": moments[1]}
                    members["flip.lite-2.npy"] = npy_bytes(tokens[1])
                    if latent:
                        members["flip.moments.npy"] = npy_bytes(moments[1])
                if change is not None:
                    members = change(key, members)
                samples.append((key, members))
                number += 1
            path = folder / f"shard-{place:06d}.tar"
            if checksums:
                write_shard(path, samples)
            elif count:
                with webdataset.TarWriter(str(path), encoder=False) as writer:
                    for key, members in samples:
                        writer.write({"__key__": key, **members})
            else:
                path.write_bytes(bytes(10240))  # what tar itself writes for no files
            shards.append((path.name, count))
        fields = {"image_format": image, "hflip": hflip}
        if checksums:
            fields["member_checksums"] = "crc32"
        if latent:
            fields["latent"] = {
                "scale": 1.0,
                "bias": 0.0,
                "shape": [8, 2, 2],
                "dtype": "float16",
                "name": "x",
            }
        write_manifest(folder, shards, **(fields | more))
        return str(folder), truth

    make.npy, make.image, make.manifest = npy_bytes, image_bytes, write_manifest
    return make
