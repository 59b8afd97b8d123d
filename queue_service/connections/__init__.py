"""Which process holds the connection to a channel of a platform, and what is delivered there."""
