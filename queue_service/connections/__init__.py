"""Which process holds the connection to a channel of a platform."""
