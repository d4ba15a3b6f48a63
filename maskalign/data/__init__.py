"""Data: shard writer, manifest, resumable stream, example data set.

The functions behind the commands live in modules of their own name: `from maskalign.data.build import build`.
"""

from typing import TYPE_CHECKING

from maskalign._lazy import lazy_exports

if TYPE_CHECKING:  # the public names, for editors and type checkers
    from maskalign.data.position import merge_states as merge_states
    from maskalign.data.stream import ShardStream as ShardStream

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Manifest": "manifest",
        "Shard": "manifest",
        "ShardStream": "stream",
        "merge_states": "position",
    },
)
