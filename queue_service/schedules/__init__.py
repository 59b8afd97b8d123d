"""Schedules: when which run is to be enqueued, and for which slots it was. Statements and values; no connection."""
