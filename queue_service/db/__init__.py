"""Reaching Postgres: which one, over what connection, with which schema. Knows nothing of runs."""
