"""Runs, waiting and at work, and those that have ended."""

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
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from queue_service.db.tables.metadata import NOW, TIMESTAMPTZ, metadata

runs = Table(
    "runs",
    metadata,
    Column("id", BigInteger, Identity(always=False)),
    Column("run_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("created_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("expires_at", TIMESTAMPTZ),
    Column("lease_id", BigInteger),
    Column("claimed_at", TIMESTAMPTZ),
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
    Column("reserved_for", Text),
    Column("attempts", JSONB),
    Column("progress", JSONB),
    PrimaryKeyConstraint("id", name="runs_pkey"),
    CheckConstraint("state in ('queued', 'running')", name="runs_state_check"),
    CheckConstraint("(state = 'running') = (lease_id is not null)", name="runs_lease_check"),
    CheckConstraint("jsonb_typeof(payload) = 'object'", name="runs_payload_check"),
    CheckConstraint(
        "run_at > '1900-01-01Z' and run_at < '9000-01-01Z' and expires_at < '9200-01-01Z'", name="runs_times_check"
    ),
)
Index(
    "runs_claim_idx",
    runs.c.queue,
    runs.c.priority.desc(),
    runs.c.run_at,
    text("(id + 0)"),
    postgresql_where=text("ordering_key is null"),
)
Index(
    "runs_lane_idx",
    runs.c.queue,
    runs.c.ordering_key,
    runs.c.id,
    postgresql_where=text("ordering_key is not null"),
)
Index(
    "runs_singleton_key_idx",
    runs.c.queue,
    runs.c.singleton_key,
    runs.c.organization_id,
    unique=True,
    postgresql_nulls_not_distinct=True,
    postgresql_where=text("singleton_key is not null"),
)
Index("runs_expiry_idx", runs.c.expires_at, postgresql_where=text("expires_at is not null"))
Index("runs_suspect_idx", runs.c.run_at, postgresql_where=text("losses > 0"))

lanes = Table(
    "lanes",
    metadata,
    Column("queue", Text, nullable=False),
    Column("ordering_key", Text, nullable=False),
    Column("next_at", TIMESTAMPTZ, nullable=False),
    Column("running", Integer, nullable=False, server_default=text("0")),
    Column("width", Integer, nullable=False, server_default=text("1")),
    Column("task", Text, nullable=False, server_default=text("''")),
    Column("reserved_for", Text),
    PrimaryKeyConstraint("queue", "ordering_key", name="lanes_pkey"),
)
Index("lanes_claim_idx", lanes.c.queue, lanes.c.task, lanes.c.next_at, postgresql_where=text("running < width"))

leases = Table(
    "leases",
    metadata,
    Column("id", BigInteger, Identity(always=True)),
    Column("worker_id", BigInteger, nullable=False),
    Column("expires_at", TIMESTAMPTZ, nullable=False),
    Column("run_ids", ARRAY(BigInteger), nullable=False),
    Column("limited", Boolean, nullable=False, server_default=text("false")),
    Column("final_tasks", ARRAY(Text)),
    PrimaryKeyConstraint("id", name="leases_pkey"),
)
Index("leases_expiry_idx", leases.c.expires_at)

finished_runs = Table(
    "finished_runs",
    metadata,
    Column("id", BigInteger, nullable=False),
    Column("finished_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("run_at", TIMESTAMPTZ, nullable=False),
    Column("created_at", TIMESTAMPTZ, nullable=False),
    Column("expires_at", TIMESTAMPTZ),
    Column("claimed_at", TIMESTAMPTZ),
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
    Column("attempts", JSONB),
    CheckConstraint("state in ('succeeded', 'failed', 'cancelled', 'expired')", name="finished_runs_state_check"),
    postgresql_partition_by="range (finished_at)",
)
Index("finished_runs_id_idx", finished_runs.c.id)
Index(
    "finished_runs_unsuccessful_idx",
    finished_runs.c.state,
    finished_runs.c.id,
    postgresql_where=text("state <> 'succeeded'"),
)

steps = Table(
    "steps",
    metadata,
    Column("run_id", BigInteger, nullable=False),
    Column("created_at", TIMESTAMPTZ, nullable=False, server_default=NOW),
    Column("attempt", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("result", JSONB, nullable=False),
    PrimaryKeyConstraint("run_id", "name", name="steps_pkey"),
)
Index("steps_created_idx", steps.c.created_at, text("(run_id + 0)"))
