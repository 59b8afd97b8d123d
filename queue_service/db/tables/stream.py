"""Streams with their events, and what shows them to people."""

from __future__ import annotations

from sqlalchemy import BigInteger, Boolean, CheckConstraint, Column, Integer, PrimaryKeyConstraint, Table, Text, text
from sqlalchemy.dialects.postgresql import JSONB

from queue_service.db.tables.metadata import NOW, ORGANIZATION, TIMESTAMPTZ, metadata

streams = Table(
    "streams",
    metadata,
    Column("stream", Text, nullable=False),
    Column("head", BigInteger, nullable=False, server_default=text("0")),
    Column("state", Text, nullable=False, server_default=text("'created'")),
    Column("created_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("organization_id", Text, server_default=ORGANIZATION),
    PrimaryKeyConstraint("stream", name="streams_pkey"),
    CheckConstraint("head >= 0", name="streams_head_check"),
    CheckConstraint(
        "state in ('created', 'starting', 'active', 'detached', 'suspended', 'closing', 'ended')",
        name="streams_state_check",
    ),
)

events = Table(
    "events",
    metadata,
    Column("stream", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("terminal", Boolean, nullable=False, server_default=text("false")),
    Column("kind", Text, nullable=False),
    Column("body", JSONB, nullable=False),
    Column("run_id", BigInteger),
    Column("attempt", Integer),
    Column("organization_id", Text, server_default=ORGANIZATION),
    PrimaryKeyConstraint("stream", "seq", name="events_pkey"),
    CheckConstraint("seq > 0", name="events_seq_check"),
    CheckConstraint("kind <> '' and terminal = (kind in ('reply', 'error'))", name="events_kind_check"),
    CheckConstraint("not terminal or jsonb_typeof(body) = 'object'", name="events_body_check"),
)

connections = Table(
    "connections",
    metadata,
    Column("platform", Text, nullable=False),
    Column("channel_id", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("expires_at", TIMESTAMPTZ, nullable=False),
    PrimaryKeyConstraint("platform", "channel_id", name="connections_pkey"),
)

renderings = Table(
    "renderings",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("platform_message_id", Text, nullable=False),
    Column("updated_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    PrimaryKeyConstraint("deployment", "message_id", name="renderings_pkey"),
)
