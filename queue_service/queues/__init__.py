"""Queues: what is set about them, such as whether one is paused. Statements and values; no connection."""
