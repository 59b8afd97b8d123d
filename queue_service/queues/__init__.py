"""Queues: the named lanes of runs, and whether they are paused. Statements and values; no connection."""
