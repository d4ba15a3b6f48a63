"""Data sets: their format on disk, the resumable stream of batches, and the tools that create them.

`format/` defines a data set on disk (manifest, tar shards, their index and members). `stream/` reads batches from one
and is the hot path of training. `build/` builds, encodes, checks and shows data sets. `stream` never imports `build`,
and `format` imports neither.
"""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.data.stream.position import merge_states as merge_states
    from maskalign.data.stream.shard_stream import ShardStream as ShardStream

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Manifest": "format.manifest",
        "Shard": "format.manifest",
        "ShardStream": "stream.shard_stream",
        "merge_states": "stream.position",
    },
)
