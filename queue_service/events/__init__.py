"""Streams: the durable, gapless log of each conversation."""
