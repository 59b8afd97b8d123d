"""Turns: what is owed an ending, and how it gets exactly one."""
