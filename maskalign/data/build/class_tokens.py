"""Statistics of a data set's class tokens: per channel, and their leading principal components.

The principal components are taken from the class tokens as they are stored, so they cost no pass of the encoder. All of
it is a function of the stored bytes: the sample is a fixed choice, and the sums are made by one thread.
"""

import os

import numpy as np
import torch

from maskalign.data.build.features import MEND, mean_sample
from maskalign.data.format.manifest import class_member
from maskalign.data.stream.decode import BadSample
from maskalign.data.stream.open_shard import BadShard, OpenShard
from maskalign.errors import RunError

IMAGES, SHARDS = 8192, 64
# Directions with less variance than this share of the first one's hold only the rounding to float16.
LEAST_VARIANCE = 1e-7


def read_class_tokens(manifest, path_of, name):
    """Class tokens of a fixed sample of a data set.

    Args:
        manifest: with the shards' own sizes.
        path_of: called with a `Shard`, gives its local path.
        name: the teacher, whose class tokens the shards hold.

    Returns:
        (n, dim) float16 array; n is at most about 8,192.

    Raises:
        RunError: a shard cannot be read.
    """
    ending, found = class_member(name).lower(), []
    dim = manifest.teachers[name]["class_token"]["dim"]
    for number, positions in mean_sample(manifest, IMAGES, SHARDS).items():
        shard = manifest.shards[number]
        values = np.empty((len(positions), dim), np.float16)
        try:
            file = OpenShard(os.open(path_of(shard), os.O_RDONLY), shard, [ending], checked=True)
            try:
                for row, position in enumerate(sorted(positions)):
                    file.read_array(position, ending, values[row])
            finally:
                file.close()
        except (BadShard, BadSample, IndexError) as error:
            raise RunError(f"cannot read shard {path_of(shard)}: {error}{MEND}") from None
        found.append(values)
    return np.concatenate(found) if found else np.empty((0, dim), np.float16)


def channel_statistics(total, squares, count):
    """Mean and standard deviation per channel, as lists of numbers that are float32 values.

    Args:
        total, squares: (dim,) float64 arrays, sums of the values and of their squares.
        count: how many values.

    Returns:
        (mean, std); std is 1 where a channel does not vary, so that it can be divided by.
    """
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), std.max(initial=0)), std, 1.0)
    return plain_floats(mean), plain_floats(std)


def principal_components(values, most):
    """The leading principal components, scaled to unit variance.

    Args:
        values: (n, dim) array.
        most: as many at most; fewer come where the values do not span them.

    Returns:
        {"mean" [dim], "basis" [M][dim], "scale" [M], "images" n, "requested" most} or None where there are none:
        ((values - mean) @ basis.T) / scale has mean 0, variance 1 (divided by n) and no correlations. The sign of a
        component is that of its largest loading.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.from_numpy(np.asarray(values, np.float64))
        n, dim = x.shape
        most_there = min(most, n - 1, dim)
        if most_there < 1:
            return None
        mean = x.mean(dim=0)
        x = x - mean
        variances, vectors = torch.linalg.eigh(x.T @ x / n)
    finally:
        torch.set_num_threads(threads)
    variances, vectors = variances.flip(0)[:most_there], vectors.flip(1).T[:most_there]
    there = int((variances > LEAST_VARIANCE * variances[0]).sum()) if variances[0] > 0 else 0
    if not there:
        return None
    basis = vectors[:there]
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return {
        "mean": plain_floats(mean.numpy()),
        "basis": [plain_floats(row) for row in basis.numpy()],
        "scale": plain_floats(variances[:there].sqrt().numpy()),
        "images": n,
        "requested": most,
    }


def add_components(entry, values, most):
    """A manifest's `class_token` entry with its principal components, and the statistics of stored prefix tokens."""
    entry = {key: value for key, value in entry.items() if key != "components"}
    if len(values) and entry["kind"] == "prefix":
        x = values.astype(np.float64)
        entry["mean"], entry["std"] = channel_statistics(x.sum(axis=0), (x**2).sum(axis=0), len(x))
    components = principal_components(values, most) if most else None
    return entry | ({"components": components} if components else {})


def plain_floats(values):
    """Numbers as a list of floats: the shortest decimals that are the same float32."""
    return [float(str(np.float32(value))) for value in values]
