"""The schema as SQLAlchemy metadata: what `alembic check` holds the migrations to, and nothing else. No query uses it."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Identity,
    Index,
    Integer,
    Interval,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, TIMESTAMP

metadata = MetaData(schema="queue_service")

_NOW = text("clock_timestamp()")
_TIMESTAMPTZ = TIMESTAMP(timezone=True)

runs = Table(
    "runs",
    metadata,
    Column("id", BigInteger, Identity(always=False)),
    Column("run_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("expires_at", _TIMESTAMPTZ),
    Column("lease_id", BigInteger),
    Column("claimed_at", _TIMESTAMPTZ),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("failures", Integer, nullable=False, server_default=text("0")),
    Column("losses", Integer, nullable=False, server_default=text("0")),
    Column("max_attempts", Integer),
    Column("priority", SmallInteger, nullable=False, server_default=text("0")),
    Column("cancel_requested", Boolean, nullable=False, server_default=text("false")),
    Column("state", Text, nullable=False, server_default=text("'queued'")),
    Column("queue", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("singleton_key", Text),
    Column("ordering_key", Text),
    Column("organization_id", Text),
    Column("retry_delay", Interval),
    Column("timeout", Interval),
    Column("metadata", JSONB),
    Column("error", JSONB),
    PrimaryKeyConstraint("id", name="runs_pkey"),
    CheckConstraint("state in ('queued', 'running')", name="runs_state_check"),
    CheckConstraint("(state = 'running') = (lease_id is not null)", name="runs_lease_check"),
    CheckConstraint("jsonb_typeof(payload) = 'object'", name="runs_payload_check"),
    CheckConstraint(
        "run_at > '1900-01-01Z' and run_at < '9000-01-01Z' and expires_at < '9200-01-01Z'", name="runs_times_check"
    ),
)
Index("runs_claim_idx", runs.c.queue, runs.c.priority.desc(), runs.c.run_at, text("(id + 0)"))
Index(
    "runs_singleton_idx",
    runs.c.queue,
    runs.c.singleton_key,
    unique=True,
    postgresql_where=text("singleton_key is not null"),
)
Index("runs_expiry_idx", runs.c.expires_at, postgresql_where=text("expires_at is not null"))
Index("runs_suspect_idx", runs.c.run_at, postgresql_where=text("losses > 0"))

leases = Table(
    "leases",
    metadata,
    Column("id", BigInteger, Identity(always=True)),
    Column("worker_id", BigInteger, nullable=False),
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
    Column("run_ids", ARRAY(BigInteger), nullable=False),
    PrimaryKeyConstraint("id", name="leases_pkey"),
)
Index("leases_expiry_idx", leases.c.expires_at)

finished_runs = Table(
    "finished_runs",
    metadata,
    Column("id", BigInteger, nullable=False),
    Column("finished_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("run_at", _TIMESTAMPTZ, nullable=False),
    Column("created_at", _TIMESTAMPTZ, nullable=False),
    Column("expires_at", _TIMESTAMPTZ),
    Column("claimed_at", _TIMESTAMPTZ),
    Column("worker_id", BigInteger),
    Column("attempt", Integer, nullable=False),
    Column("failures", Integer, nullable=False),
    Column("losses", Integer, nullable=False),
    Column("max_attempts", Integer),
    Column("priority", SmallInteger, nullable=False),
    Column("state", Text, nullable=False),
    Column("queue", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("singleton_key", Text),
    Column("ordering_key", Text),
    Column("organization_id", Text),
    Column("retry_delay", Interval),
    Column("timeout", Interval),
    Column("metadata", JSONB),
    Column("result", JSONB),
    Column("error", JSONB),
    CheckConstraint("state in ('succeeded', 'failed', 'cancelled', 'expired')", name="finished_runs_state_check"),
    postgresql_partition_by="range (finished_at)",
)
Index("finished_runs_id_idx", finished_runs.c.id)

queues = Table(
    "queues",
    metadata,
    Column("name", Text, nullable=False),
    Column("paused_at", _TIMESTAMPTZ),
    PrimaryKeyConstraint("name", name="queues_pkey"),
)

workers = Table(
    "workers",
    metadata,
    Column("id", BigInteger, Identity(always=True)),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("queues", JSONB, nullable=False),
    Column("started_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("seen_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    PrimaryKeyConstraint("id", name="workers_pkey"),
)
