"""Queues, and what is enqueued into them by the clock."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Index,
    Integer,
    Interval,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import DOUBLE_PRECISION, JSONB

from queue_service.db.tables.metadata import NOW, TIMESTAMPTZ, metadata

queues = Table(
    "queues",
    metadata,
    Column("name", Text, nullable=False),
    Column("paused_at", TIMESTAMPTZ),
    Column("resumes_at", TIMESTAMPTZ),
    Column("max_running", Integer),
    Column("max_running_per_key", Integer),
    Column("rate", Integer),
    Column("period", Interval),
    Column("burst", Integer),
    Column("tokens", DOUBLE_PRECISION),
    Column("tokens_at", TIMESTAMPTZ),
    Column("claims", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("name", name="queues_pkey"),
    CheckConstraint(
        "max_running > 0 and max_running_per_key > 0 and rate > 0 and period > '0' and burst > 0",
        name="queues_limits_check",
    ),
    CheckConstraint("num_nulls(rate, period, burst, tokens, tokens_at) in (0, 5)", name="queues_rate_check"),
)

schedules = Table(
    "schedules",
    metadata,
    Column("name", Text, nullable=False),
    Column("next_at", TIMESTAMPTZ, nullable=False),
    Column("paused_at", TIMESTAMPTZ),
    Column("created_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("updated_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("every", Interval),
    Column("cron", Text),
    Column("timezone", Text, nullable=False, server_default=text("'UTC'")),
    Column("misfire", Text, nullable=False, server_default=text("'last'")),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    Column("task", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("expires_in", Interval),
    Column("turn", JSONB),
    PrimaryKeyConstraint("name", name="schedules_pkey"),
    CheckConstraint("(cron is null) <> (every is null) and every > '0'", name="schedules_timing_check"),
    CheckConstraint("misfire in ('skip', 'last', 'all')", name="schedules_misfire_check"),
    CheckConstraint("jsonb_typeof(payload) = 'object'", name="schedules_payload_check"),
    CheckConstraint("jsonb_typeof(turn) = 'object'", name="schedules_turn_check"),
    CheckConstraint("next_at > '1900-01-01Z' and next_at < '9000-01-01Z'", name="schedules_next_check"),
)
Index("schedules_due_idx", schedules.c.next_at, schedules.c.name, postgresql_where=text("paused_at is null"))

schedule_slots = Table(
    "schedule_slots",
    metadata,
    Column("schedule", Text, nullable=False),
    Column("slot", TIMESTAMPTZ, nullable=False),
    Column("fired_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("run_id", BigInteger, nullable=False),
    PrimaryKeyConstraint("schedule", "slot", name="schedule_slots_pkey"),
)
