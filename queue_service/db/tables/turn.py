"""Turns, and what has become of them."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Interval, PrimaryKeyConstraint, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB

from queue_service.db.tables.metadata import NOW, ORGANIZATION, TIMESTAMPTZ, metadata

turn_markers = Table(
    "turn_markers",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("deadline", TIMESTAMPTZ, nullable=False),
    Column("armed_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("admitted_at", TIMESTAMPTZ),
    Column("admission", Interval, nullable=False),
    Column("execution", Interval, nullable=False),
    Column("run_id", BigInteger),
    Column("failure_code", Text),
    Column("failure_reason", Text),
    Column("stream", Text, nullable=False),
    Column("platform", Text, nullable=False, server_default=text("'api'")),
    Column("channel_id", Text),
    Column("user_id", Text),
    Column("organization_id", Text),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    Column("ends_by", TIMESTAMPTZ),
    PrimaryKeyConstraint("deployment", "message_id", name="turn_markers_pkey"),
    CheckConstraint(
        "deployment <> '' and message_id <> '' and stream <> '' and platform <> '' and channel_id <> '' "
        "and user_id <> '' and organization_id <> ''",
        name="turn_markers_words_check",
    ),
    CheckConstraint(
        "deadline > '1900-01-01Z' and deadline < '9000-01-01Z' and admission > '0' and admission <= '36500 days' "
        "and execution > '0' and execution <= '36500 days'",
        name="turn_markers_deadline_check",
    ),
    CheckConstraint("failure_code is not null or failure_reason is null", name="turn_markers_failure_check"),
    CheckConstraint("ends_by > '1900-01-01Z' and ends_by < '9000-01-01Z'", name="turn_markers_ends_by_check"),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="turn_markers_metadata_check"),
)
Index("turn_markers_deadline_idx", turn_markers.c.deadline)

turn_outcomes = Table(
    "turn_outcomes",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("stream", Text, nullable=False),
    Column("armed_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("ended_at", TIMESTAMPTZ),
    Column("seq", BigInteger),
    Column("kind", Text),
    Column("code", Text),
    Column("organization_id", Text, server_default=ORGANIZATION),
    PrimaryKeyConstraint("deployment", "message_id", name="turn_outcomes_pkey"),
    CheckConstraint("kind in ('reply', 'error', 'discharged')", name="turn_outcomes_kind_check"),
    CheckConstraint(
        "(kind is null) = (ended_at is null) and (seq is null) = coalesce(kind = 'discharged', true) "
        "and (code is null) = coalesce(kind <> 'error', true)",
        name="turn_outcomes_ended_check",
    ),
)
Index("turn_outcomes_armed_idx", turn_outcomes.c.armed_at)

receipts = Table(
    "receipts",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("digest", Text, nullable=False),
    Column("organization_id", Text, server_default=ORGANIZATION),
    PrimaryKeyConstraint("deployment", "message_id", name="receipts_pkey"),
)
