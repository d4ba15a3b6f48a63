"""Several data sets by weight: opened together, and which one a draw comes from, in a cycle that keeps the shares."""

from fractions import Fraction
from math import gcd, lcm

from maskalign.config.teacher_names import no_class_tokens
from maskalign.data.stream.opening import Opener
from maskalign.data.stream.samples import columns_of
from maskalign.errors import UsageError

LONGEST = 65536  # draws in a cycle; weights that need a longer one are rounded to 1/65536


def parse_paths(path):
    """[(path, weight), ...] from one path, a list of paths or of (path, weight), or a dict {path: weight}."""
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
        path: as `parse_paths` takes it.
        settings: timeout, retries, cache_dir, allow_pipe of `opening.Opener`.

    Returns:
        (weights, openers, manifests), a list each.

    Raises:
        UsageError: one is not there, has no samples, or they do not fit each other.
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
    """Refuse a mixture whose data sets have other class tokens; of the teachers `names`, which are to be read.

    Principal components may differ: those of the first data set serve all of them.

    Args:
        roots: folder or URL of each data set, for messages.
        manifests: of the data sets.
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
    """Data set of each draw in one cycle, spread as evenly as whole draws allow.

    Over a cycle every data set has exactly its share; in the first n draws of it the error is below one draw
    (largest-deficit-first, the smooth weighted round robin).
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
    """Data set of draw n of stream s.

    Args:
        weights: one positive number per data set.
        streams: number of logical streams.
    """

    def __init__(self, weights, streams):
        self.pattern = cycle(weights)
        length = len(self.pattern)
        # One row of draws (one per stream) follows the last one in the cycle. Where the number of streams
        # shares a divisor with the length, a stream would always see the same few data sets, so rows are
        # shifted a little.
        self.stride = next(q for q in range(streams, streams + length + 1) if gcd(q, length) == 1)

    def __call__(self, stream, n):
        return self.pattern[(n * self.stride + stream) % len(self.pattern)]
