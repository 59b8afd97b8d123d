"""Turns, streams and their events, and who holds which connection.

Phase: expand. Lock: `runs` exclusively for a moment, to add a column without rewriting it.
"""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

TABLES = """
create table queue_service.turn_markers (
    deployment      text not null,
    message_id      text not null,
    deadline        timestamptz not null,
    armed_at        timestamptz not null default clock_timestamp(),
    -- When the worker gave its first sign of life; until then the deadline is the admission's.
    admitted_at     timestamptz,
    admission       interval not null,
    execution       interval not null,
    run_id          bigint,
    failure_code    text,
    failure_reason  text,
    stream          text not null,
    platform        text not null default 'api',
    channel_id      text,
    user_id         text,
    organization_id text,
    metadata        jsonb not null default '{}',
    constraint turn_markers_pkey primary key (deployment, message_id),
    constraint turn_markers_words_check check (
        deployment <> '' and message_id <> '' and stream <> '' and platform <> '' and channel_id <> ''
        and user_id <> '' and organization_id <> ''
    ),
    -- A deadline that never comes would be an obligation that never ends.
    constraint turn_markers_deadline_check check (
        deadline > '1900-01-01Z' and deadline < '9000-01-01Z'
        and admission > '0' and admission <= '36500 days' and execution > '0' and execution <= '36500 days'
    ),
    constraint turn_markers_failure_check check (failure_code is not null or failure_reason is null),
    constraint turn_markers_metadata_check check (jsonb_typeof(metadata) = 'object')
) with (
    fillfactor = 70,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.01
);

create index turn_markers_deadline_idx on queue_service.turn_markers (deadline);

-- One row for each turn, from its arming on, and never taken away while it matters: so that this one unique key decides
-- between arming and ending, in whatever transactions they meet. What ended it is null for as long as it is owed.
create table queue_service.turn_outcomes (
    deployment text not null,
    message_id text not null,
    stream     text not null,
    armed_at   timestamptz not null default clock_timestamp(),
    ended_at   timestamptz,
    seq        bigint,
    kind       text,
    code       text,
    constraint turn_outcomes_pkey primary key (deployment, message_id),
    constraint turn_outcomes_kind_check check (kind in ('reply', 'error', 'discharged')),
    constraint turn_outcomes_ended_check check (
        (kind is null) = (ended_at is null)
        and (seq is null) = coalesce(kind = 'discharged', true)
        and (code is null) = coalesce(kind <> 'error', true)
    )
) with (
    -- Room for the one update that each row gets: it is in no index, and then costs no index anything.
    fillfactor = 50,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.05
);

create index turn_outcomes_armed_idx on queue_service.turn_outcomes (armed_at);

create table queue_service.streams (
    stream     text not null,
    head       bigint not null default 0,
    state      text not null default 'created',
    created_at timestamptz not null default clock_timestamp(),
    constraint streams_pkey primary key (stream),
    constraint streams_head_check check (head >= 0),
    constraint streams_state_check check (
        state in ('created', 'starting', 'active', 'detached', 'suspended', 'closing', 'ended')
    )
) with (
    fillfactor = 50,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.01
);

create table queue_service.events (
    stream     text not null,
    seq        bigint not null,
    created_at timestamptz not null default clock_timestamp(),
    terminal   boolean not null default false,
    kind       text not null,
    body       jsonb not null,
    constraint events_pkey primary key (stream, seq),
    constraint events_seq_check check (seq > 0),
    constraint events_kind_check check (kind <> '' and terminal = (kind in ('reply', 'error'))),
    constraint events_body_check check (not terminal or jsonb_typeof(body) = 'object')
) with (
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.05
);

create table queue_service.connections (
    platform   text not null,
    channel_id text not null,
    owner      text not null,
    expires_at timestamptz not null,
    constraint connections_pkey primary key (platform, channel_id)
) with (fillfactor = 50);

-- Whose turn it is to claim a run first, for a second. Null: anyone's.
alter table queue_service.runs add column reserved_for text;
"""


def upgrade() -> None:
    op.execute(TABLES)


def downgrade() -> None:
    op.execute(
        "drop table queue_service.turn_markers, queue_service.turn_outcomes, queue_service.streams, "
        "queue_service.events, queue_service.connections"
    )
    op.execute("alter table queue_service.runs drop column reserved_for")
