"""Runs: one unit of work each, from enqueue to ending. Statements and values; no connection."""
