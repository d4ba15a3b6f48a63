"""Bad samples: each is counted and reported once, and their number is limited."""

import logging
from collections import Counter

from maskalign.errors import RunError

log = logging.getLogger(__name__)


class BadSamples:
    """The bad samples that a stream has found.

    Args:
        root: path of the (first) data set, for messages.
        manifests: the `Manifest`s of the data sets.
        max_fraction: share of all samples that may be bad.

    Attributes:
        places: dict whose keys are (data set, shard, sample) of all bad samples, used as an ordered set.
        lines: one line for each bad sample found by this object (not before a restart).
        limit: the largest number of bad samples that is allowed.
    """

    def __init__(self, root, manifests, max_fraction):
        self.root, self.manifests, self.max_fraction = root, manifests, max_fraction
        self.total = sum(manifest.num_samples for manifest in manifests)
        self.limit = int(max_fraction * self.total + 1e-6)  # 0.29 * 100 is a little below 29
        self.places, self.lines, self._named_shards = {}, [], set()

    def note(self, bad):
        """Count and log the new bad samples in a list `samples.Filled.bad`; returns the number of new ones."""
        new = 0
        for dataset, shard, sample, key, reason, whole in bad:
            if (dataset, shard, sample) in self.places:
                continue
            new += 1
            self.places[dataset, shard, sample] = None
            name = self.manifests[dataset].shards[shard].name
            line = f"{name}, sample {key if key is not None else f'#{sample}'}: {reason}"
            self.lines.append(line)
            if not whole:
                log.warning("bad sample skipped: %s", line)
            elif (dataset, shard) not in self._named_shards:
                self._named_shards.add((dataset, shard))
                count = self.manifests[dataset].shards[shard].num_samples
                log.warning("bad shard skipped: %s with %d samples: %s", name, count, reason)
        return new

    def check(self):
        """Raise a RunError that names the shards if there are too many bad samples."""
        if len(self.places) <= self.limit:
            return
        counts = Counter((dataset, shard) for dataset, shard, _ in self.places)
        names = [f"{self.manifests[d].shards[s].name} ({n})" for (d, s), n in counts.most_common(10)]
        more = f" and {len(counts) - 10} more shards" if len(counts) > 10 else ""
        last = f"; last: {self.lines[-1]}" if self.lines else ""
        raise RunError(
            f"{self.root}: more than {self.max_fraction:g} of {self.total} samples are bad (data.max_bad_fraction): "
            f"{', '.join(names)}{more}{last}; see `maskalign data check`"
        )
