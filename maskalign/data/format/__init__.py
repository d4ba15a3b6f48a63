"""The format of a data set on disk: manifest.json, tar shards, the index at their end, and their members."""
