"""Named parts of a run have their results stored, so that a later attempt does not repeat them.

Phase: expand. Lock: none.
"""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

TABLE = """
create table queue_service.steps (
    run_id     bigint not null,
    created_at timestamptz not null default clock_timestamp(),
    attempt    integer not null,
    name       text not null,
    result     jsonb not null,
    constraint steps_pkey primary key (run_id, name)
) with (
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.05
);

-- By time, for the pruner. An expression, so that no plan made while the table was empty looks for a run in it.
create index steps_created_idx on queue_service.steps (created_at, (run_id + 0));
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("drop table queue_service.steps")
