"""Background work of a process: sweeping, pruning, notices. Each part has a `once()` that tests and the CLI call."""
