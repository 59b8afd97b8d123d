"""The processes that are at work: workers, deployments, gateways."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Identity, Index, PrimaryKeyConstraint, Table, Text, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from queue_service.db.tables.metadata import NOW, TIMESTAMPTZ, metadata

workers = Table(
    "workers",
    metadata,
    Column("id", BigInteger, Identity(always=True)),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("queues", JSONB, nullable=False),
    Column("started_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("seen_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("failing", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("fleet", Text),
    Column("revision", Text),
    PrimaryKeyConstraint("id", name="workers_pkey"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("holding", Text, nullable=False),
    Column("held_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("expires_at", TIMESTAMPTZ, nullable=False),
    Column("wanted_at", TIMESTAMPTZ),
    PrimaryKeyConstraint("deployment", name="deployments_pkey"),
)

# Unlogged: what is in them is of no use after a crash of the server.
gateways = Table(
    "gateways",
    metadata,
    Column("id", Text, nullable=False),
    Column("expires_at", TIMESTAMPTZ, nullable=False),
    Column("revision", Text),
    PrimaryKeyConstraint("id", name="gateways_pkey"),
    prefixes=["UNLOGGED"],
)

gateway_requests = Table(
    "gateway_requests",
    metadata,
    Column("id", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("expires_at", TIMESTAMPTZ, nullable=False),
    Column("answer", Text),
    Column("body", Text, nullable=False),
    PrimaryKeyConstraint("id", name="gateway_requests_pkey"),
    CheckConstraint("answer in ('applied', 'gone', 'failed')", name="gateway_requests_answer_check"),
    prefixes=["UNLOGGED"],
)
Index(
    "gateway_requests_asked_idx",
    gateway_requests.c.gateway,
    postgresql_where=text("answer is null"),
)
Index("gateway_requests_expiry_idx", gateway_requests.c.expires_at)
