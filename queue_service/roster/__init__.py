"""The roster of live worker processes. Statements and values; no connection."""
