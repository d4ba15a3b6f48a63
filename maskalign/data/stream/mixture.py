"""Mixtures of data sets: opening them together, and a cycle that assigns each draw to a data set by weight."""

from fractions import Fraction
from math import gcd, lcm

from maskalign.config.teacher_names import no_class_tokens
from maskalign.data.stream.opening import Opener
from maskalign.data.stream.samples import columns_of
from maskalign.errors import UsageError

LONGEST = 65536  # the longest cycle, in draws; weights that need a longer one are rounded to 1/65536


def parse_paths(path):
    """[(path, weight), ...] from one path, a list of paths or of (path, weight), or a dict {path: weight}.

    Raises:
        UsageError: another form, or a weight that is not positive.
    """
    if isinstance(path, dict):
        pairs = list(path.items())
    elif isinstance(path, (list, tuple)):
        pairs = [tuple(item) if isinstance(item, (list, tuple)) else (item, 1) for item in path]
    else:
        pairs = [(path, 1)]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"data.path {path!r}: give one data set, a list of them, or {{data set: weight}}")
    for name, weight in pairs:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
            raise UsageError(f"data.path: the weight of {name} is {weight!r}; give a positive number")
    return pairs


def open_data_sets(path, **settings):
    """Open the data sets of a `data.path` and read their manifests.

    Args:
        path: as for `parse_paths`.
        settings: timeout, retries, cache_dir, allow_pipe of `opening.Opener`.

    Returns:
        (weights, openers, manifests), lists with one entry per data set.

    Raises:
        UsageError: a data set does not exist or has no samples, or the data sets do not match.
    """
    pairs = parse_paths(path)
    openers = [Opener(where, **settings) for where, _ in pairs]
    manifests = [opener.manifest() for opener in openers]
    first = manifests[0]
    for opener, manifest in zip(openers, manifests, strict=True):
        if not manifest.num_samples:
            raise UsageError(f"{opener.root}: the data set has no samples")
        for what, here, there in (
            ("class names", manifest.class_names, first.class_names),
            ("tensors", columns_of(manifest), columns_of(first)),
            ("latent", manifest.latent, first.latent),
            ("token grids or normalizations of teachers", _token_kinds(manifest), _token_kinds(first)),
        ):
            if here != there:
                raise UsageError(f"{opener.root} and {openers[0].root} cannot be mixed: other {what}")
    return [weight for _, weight in pairs], openers, manifests


def check_class_tokens(roots, manifests, names):
    """Check that all data sets of a mixture have the same kind of class tokens.

    Principal components may differ, because those of the first data set are used for all.

    Args:
        roots: folder or URL of each data set, for messages.
        manifests: the `Manifest`s of the data sets.
        names: the teachers whose class tokens will be read.

    Raises:
        UsageError: a data set has no class tokens, or other ones.
    """
    for name in names:
        first = manifests[0].teachers[name]["class_token"]
        for root, manifest in zip(roots, manifests, strict=True):
            entry = manifest.teachers[name].get("class_token")
            if entry is None:
                raise UsageError(f"{root}: {no_class_tokens(name, root)}")
            keys = ("dim", "dtype", "kind", *(("mean", "std") if first["kind"] == "mean" else ()))
            unlike = [key for key in keys if entry.get(key) != first.get(key)]
            if unlike:
                raise UsageError(
                    f"{root} and {roots[0]} cannot be mixed: other class tokens of {name!r} ({', '.join(unlike)}); "
                    "train without model.class_token, or build and encode them as one data set"
                )


def _token_kinds(manifest):
    return {name: (list(entry["grid"]), entry.get("normalize")) for name, entry in manifest.teachers.items()}


def cycle(weights):
    """The data set of each draw in one cycle, distributed as evenly as possible.

    Over a whole cycle every data set has exactly its share. In the first n draws, the error is below one draw. This is
    smooth weighted round robin: the data set with the largest deficit is next.
    """
    shares = [Fraction(str(weight)) for weight in weights]
    shares = [share / sum(shares) for share in shares]
    length = lcm(*(share.denominator for share in shares))
    if length > LONGEST:
        length = LONGEST
        counts = [max(1, round(share * length)) for share in shares]
        counts[counts.index(max(counts))] += length - sum(counts)
    else:
        counts = [int(share * length) for share in shares]
    drawn, pattern = [0] * len(counts), []
    for n in range(1, length + 1):
        choice = max(range(len(counts)), key=lambda i: counts[i] * n - drawn[i] * length)
        drawn[choice] += 1
        pattern.append(choice)
    return pattern


class Mixture:
    """The data set of draw n of stream s.

    Args:
        weights: one positive number per data set.
        streams: number of logical streams.
    """

    def __init__(self, weights, streams):
        self.pattern = cycle(weights)
        length = len(self.pattern)
        # Rows of draws (one draw per stream) follow each other in the cycle. If the number of streams and the length
        # had a common divisor, a stream would only draw from some of the data sets, so the stride between rows is the
        # next number without a common divisor.
        self.stride = next(q for q in range(streams, streams + length + 1) if gcd(q, length) == 1)

    def __call__(self, stream, n):
        return self.pattern[(n * self.stride + stream) % len(self.pattern)]
