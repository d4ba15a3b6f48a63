"""The hot path: which sample comes when, reading it, and batches whose position fits in a checkpoint."""
