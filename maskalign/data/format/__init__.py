"""What a data set is on disk: manifest.json, tar shards, the index at their end, and their members."""
