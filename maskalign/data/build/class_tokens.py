"""Statistics of a data set's class tokens: mean and standard deviation per channel, and leading principal components.

The principal components are computed from the stored class tokens, without a pass of the encoder. The result depends
only on the stored bytes: the sample is a fixed choice, and one thread computes the sums.
"""

import os

import numpy as np
import torch

from maskalign.data.build.features import CHECK_HINT, mean_sample
from maskalign.data.format.manifest import class_member
from maskalign.data.stream.decode import BadSample
from maskalign.data.stream.open_shard import BadShard, OpenShard
from maskalign.errors import RunError

IMAGES, SHARDS = 8192, 64
# A direction whose variance is a smaller share of that of the first one is only due to rounding to float16.
LEAST_VARIANCE = 1e-7


def read_class_tokens(manifest, path_of, name):
    """Read the class tokens of a fixed sample of a data set.

    Args:
        manifest: the manifest, whose shards are those to be read.
        path_of: function from a `Shard` to its local path.
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
            raise RunError(f"cannot read shard {path_of(shard)}: {error}{CHECK_HINT}") from None
        found.append(values)
    return np.concatenate(found) if found else np.empty((0, dim), np.float16)


def channel_statistics(total, squares, count):
    """Mean and standard deviation per channel.

    Args:
        total, squares: (dim,) float64 arrays, sums of the values and of their squares.
        count: the number of values.

    Returns:
        (mean, std), lists of floats that are float32 values. std is 1 where a channel is constant, so that dividing by
        it is always possible.
    """
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    std = np.where(std > 1e-6 * np.maximum(np.abs(mean), std.max(initial=0)), std, 1.0)
    return plain_floats(mean), plain_floats(std)


def principal_components(values, most):
    """The leading principal components, scaled to unit variance.

    Args:
        values: (n, dim) array.
        most: the maximum number of components; there are fewer where the values do not span as many.

    Returns:
        {"mean" [dim], "basis" [M][dim], "scale" [M], "images" n, "requested" most}, or None if there is no component.
        ((values - mean) @ basis.T) / scale has mean 0, variance 1 (divided by n) and no correlations. The sign of a
        component is such that its largest loading is positive.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.from_numpy(np.asarray(values, np.float64))
        n, dim = x.shape
        available = min(most, n - 1, dim)
        if available < 1:
            return None
        mean = x.mean(dim=0)
        x = x - mean
        variances, vectors = torch.linalg.eigh(x.T @ x / n)
    finally:
        torch.set_num_threads(threads)
    variances, vectors = variances.flip(0)[:available], vectors.flip(1).T[:available]
    count = int((variances > LEAST_VARIANCE * variances[0]).sum()) if variances[0] > 0 else 0
    if not count:
        return None
    basis = vectors[:count]
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    return {
        "mean": plain_floats(mean.numpy()),
        "basis": [plain_floats(row) for row in basis.numpy()],
        "scale": plain_floats(variances[:count].sqrt().numpy()),
        "images": n,
        "requested": most,
    }


def add_components(entry, values, most):
    """Add principal components to a manifest's `class_token` entry, and for prefix tokens mean and std.

    Args:
        entry: the entry, with "kind".
        values: (n, dim) stored class tokens.
        most: the maximum number of components; 0 for none.

    Returns:
        The new entry.
    """
    entry = {key: value for key, value in entry.items() if key != "components"}
    if len(values) and entry["kind"] == "prefix":
        x = values.astype(np.float64)
        entry["mean"], entry["std"] = channel_statistics(x.sum(axis=0), (x**2).sum(axis=0), len(x))
    components = principal_components(values, most) if most else None
    return entry | ({"components": components} if components else {})


def plain_floats(values):
    """Convert numbers to a list of floats: the shortest decimals that round to the same float32."""
    return [float(str(np.float32(value))) for value in values]
