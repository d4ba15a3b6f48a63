"""General modules that every package may use: devices, ranks, files, locks, restarts."""
