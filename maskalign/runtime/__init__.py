"""What every part may use and what knows nothing of diffusion: files, locks, and the rounds of a restarted job."""
