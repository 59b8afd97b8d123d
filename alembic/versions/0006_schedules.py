"""Schedules, and the slots for which they have fired.

Phase: expand. Lock: none.
"""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

TABLES = """
create table queue_service.schedules (
    name       text not null,
    next_at    timestamptz not null,
    paused_at  timestamptz,
    created_at timestamptz not null default clock_timestamp(),
    updated_at timestamptz not null default clock_timestamp(),
    every      interval,
    cron       text,
    timezone   text not null default 'UTC',
    misfire    text not null default 'last',
    priority   smallint not null default 0,
    task       text not null,
    queue      text not null,
    payload    jsonb not null,
    expires_in interval,
    constraint schedules_pkey primary key (name),
    constraint schedules_timing_check check ((cron is null) <> (every is null) and every > '0'),
    constraint schedules_misfire_check check (misfire in ('skip', 'last', 'all')),
    constraint schedules_payload_check check (jsonb_typeof(payload) = 'object'),
    constraint schedules_next_check check (next_at > '1900-01-01Z' and next_at < '9000-01-01Z')
) with (
    fillfactor = 70,
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_scale_factor = 0.05
);

create index schedules_due_idx on queue_service.schedules (next_at, name) where paused_at is null;

create table queue_service.schedule_slots (
    schedule text not null,
    slot     timestamptz not null,
    fired_at timestamptz not null default clock_timestamp(),
    run_id   bigint not null,
    constraint schedule_slots_pkey primary key (schedule, slot)
) with (
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.05
);
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute("drop table queue_service.schedules, queue_service.schedule_slots")
