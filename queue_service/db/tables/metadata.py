"""What the tables have in common."""

from __future__ import annotations

from sqlalchemy import MetaData, text
from sqlalchemy.dialects.postgresql import TIMESTAMP

metadata = MetaData(schema="queue_service")

NOW = text("clock_timestamp()")
# That of the session, if it says one.
ORGANIZATION = text("queue_service.organization()")
TIMESTAMPTZ = TIMESTAMP(timezone=True)
