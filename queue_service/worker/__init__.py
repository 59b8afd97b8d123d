"""The worker process: claims runs, executes them, keeps their leases, records their endings."""
