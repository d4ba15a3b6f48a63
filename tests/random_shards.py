"""Random pictures in shards, and networks that are small enough to encode them in milliseconds."""

import io
import os

import numpy as np
from PIL import Image

from maskalign.data.format.manifest import Manifest
from maskalign.data.format.tar_shards import write_shard

VIT = "timm:test_vit"  # 10x10 tokens of 64; small enough to encode a picture in a few ms
RESNET = "timm:test_resnet"


def make_data_set(folder, counts=(5, 4, 3), size=16, seed=0, **fields):
    """A data set of random PNG pictures in shards of the given sample counts."""
    os.makedirs(folder, exist_ok=True)
    generator = np.random.default_rng(seed)

    def samples(first, count):
        for number in range(first, first + count):
            buffer = io.BytesIO()
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((size, size), Image.Resampling.BILINEAR).save(buffer, "PNG")
            yield f"{number:08d}", {"cls": str(number % 3).encode(), "png": buffer.getvalue()}

    shards = [
        write_shard(os.path.join(folder, f"shard-{i:06d}.tar"), samples(sum(counts[:i]), count))
        for i, count in enumerate(counts)
    ]
    manifest = Manifest(sum(counts), size, ["a", "b", "c"], shards, root=str(folder), source="random", **fields)
    manifest.save(folder)
    return manifest
