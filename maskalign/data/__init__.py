"""Data: shard writer, manifest, resumable stream, example data set.

The functions behind the commands live in modules of their own name: `from maskalign.data.build import build`.
"""

from maskalign._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Manifest": "manifest",
        "Shard": "manifest",
        "ShardStream": "stream",
        "merge_states": "position",
    },
)
