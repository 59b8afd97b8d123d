"""The durations that a client keeps to."""

from __future__ import annotations

import random

import msgspec

from queue_service.backoff import Pauses


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds, but for `heartbeat_grace`: how many heartbeats may fail to come."""

    first_pause: float
    longest_pause: float
    heartbeat_grace: float
    answer_timeout: float

    def pauses(self) -> Pauses:
        """The pauses after failures in a row, with full jitter: clients that lost the same gateway come back apart."""
        return Pauses(self.first_pause, self.longest_pause, jitter=random.random)
