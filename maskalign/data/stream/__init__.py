"""The hot path of training: the order of samples, reading them, and batches with a position for checkpoints."""
