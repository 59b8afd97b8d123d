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
from sqlalchemy.dialects.postgresql import ARRAY, DOUBLE_PRECISION, JSONB, TIMESTAMP

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
    "runs_singleton_idx",
    runs.c.queue,
    runs.c.singleton_key,
    unique=True,
    postgresql_where=text("singleton_key is not null"),
)
Index("runs_expiry_idx", runs.c.expires_at, postgresql_where=text("expires_at is not null"))
Index("runs_suspect_idx", runs.c.run_at, postgresql_where=text("losses > 0"))

lanes = Table(
    "lanes",
    metadata,
    Column("queue", Text, nullable=False),
    Column("ordering_key", Text, nullable=False),
    Column("next_at", _TIMESTAMPTZ, nullable=False),
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
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
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
    Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("attempt", Integer, nullable=False),
    Column("name", Text, nullable=False),
    Column("result", JSONB, nullable=False),
    PrimaryKeyConstraint("run_id", "name", name="steps_pkey"),
)
Index("steps_created_idx", steps.c.created_at, text("(run_id + 0)"))

queues = Table(
    "queues",
    metadata,
    Column("name", Text, nullable=False),
    Column("paused_at", _TIMESTAMPTZ),
    Column("resumes_at", _TIMESTAMPTZ),
    Column("max_running", Integer),
    Column("max_running_per_key", Integer),
    Column("rate", Integer),
    Column("period", Interval),
    Column("burst", Integer),
    Column("tokens", DOUBLE_PRECISION),
    Column("tokens_at", _TIMESTAMPTZ),
    Column("claims", BigInteger, nullable=False, server_default=text("0")),
    PrimaryKeyConstraint("name", name="queues_pkey"),
    CheckConstraint(
        "max_running > 0 and max_running_per_key > 0 and rate > 0 and period > '0' and burst > 0",
        name="queues_limits_check",
    ),
    CheckConstraint("num_nulls(rate, period, burst, tokens, tokens_at) in (0, 5)", name="queues_rate_check"),
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
    Column("failing", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("fleet", Text),
    PrimaryKeyConstraint("id", name="workers_pkey"),
)

turn_markers = Table(
    "turn_markers",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("deadline", _TIMESTAMPTZ, nullable=False),
    Column("armed_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("admitted_at", _TIMESTAMPTZ),
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
    Column("ends_by", _TIMESTAMPTZ),
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
    Column("armed_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("ended_at", _TIMESTAMPTZ),
    Column("seq", BigInteger),
    Column("kind", Text),
    Column("code", Text),
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
    PrimaryKeyConstraint("deployment", "message_id", name="receipts_pkey"),
)

streams = Table(
    "streams",
    metadata,
    Column("stream", Text, nullable=False),
    Column("head", BigInteger, nullable=False, server_default=text("0")),
    Column("state", Text, nullable=False, server_default=text("'created'")),
    Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
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
    Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("terminal", Boolean, nullable=False, server_default=text("false")),
    Column("kind", Text, nullable=False),
    Column("body", JSONB, nullable=False),
    Column("run_id", BigInteger),
    Column("attempt", Integer),
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
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
    PrimaryKeyConstraint("platform", "channel_id", name="connections_pkey"),
)

renderings = Table(
    "renderings",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("message_id", Text, nullable=False),
    Column("platform_message_id", Text, nullable=False),
    Column("updated_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    PrimaryKeyConstraint("deployment", "message_id", name="renderings_pkey"),
)

deployments = Table(
    "deployments",
    metadata,
    Column("deployment", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("holding", Text, nullable=False),
    Column("held_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
    Column("wanted_at", _TIMESTAMPTZ),
    PrimaryKeyConstraint("deployment", name="deployments_pkey"),
)

# Unlogged: what is in them is of no use after a crash of the server.
gateways = Table(
    "gateways",
    metadata,
    Column("id", Text, nullable=False),
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
    PrimaryKeyConstraint("id", name="gateways_pkey"),
    prefixes=["UNLOGGED"],
)

gateway_requests = Table(
    "gateway_requests",
    metadata,
    Column("id", Text, nullable=False),
    Column("gateway", Text, nullable=False),
    Column("expires_at", _TIMESTAMPTZ, nullable=False),
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

schedules = Table(
    "schedules",
    metadata,
    Column("name", Text, nullable=False),
    Column("next_at", _TIMESTAMPTZ, nullable=False),
    Column("paused_at", _TIMESTAMPTZ),
    Column("created_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("updated_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
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
    Column("slot", _TIMESTAMPTZ, nullable=False),
    Column("fired_at", _TIMESTAMPTZ, nullable=False, server_default=_NOW),
    Column("run_id", BigInteger, nullable=False),
    PrimaryKeyConstraint("schedule", "slot", name="schedule_slots_pkey"),
)
