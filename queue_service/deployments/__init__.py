"""Which process runs the child of a deployment."""
