"""Which replicas of the gateway live, and what one of them asks another to do with a connection."""
