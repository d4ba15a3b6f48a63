"""What every package may use, without anything about diffusion: devices, ranks, files, locks, restarts."""
