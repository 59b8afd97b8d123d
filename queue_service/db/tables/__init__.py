"""The schema as SQLAlchemy metadata: what `alembic check` holds the migrations to, and nothing else. No query uses it."""

from __future__ import annotations

from queue_service.db.tables import process, queue, stream, turn
from queue_service.db.tables.metadata import metadata
from queue_service.db.tables.run import runs

__all__ = ["metadata", "process", "queue", "runs", "stream", "turn"]
