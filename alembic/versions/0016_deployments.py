"""Which process runs the child of a deployment: one at a time, for as long as it renews its lease.

Phase: expand. Lock: none on what is there.
"""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

TABLE = """
create table queue_service.deployments (
    deployment text not null,
    -- The process, by the name for which runs are reserved.
    owner      text not null,
    -- The one start of a child there, which renews and releases.
    holding    text not null,
    held_at    timestamptz not null default clock_timestamp(),
    expires_at timestamptz not null,
    -- When another process asked last that it be let go.
    wanted_at  timestamptz,
    constraint deployments_pkey primary key (deployment)
) with (fillfactor = 50)
"""


def upgrade() -> None:
    op.execute(TABLE)


def downgrade() -> None:
    op.execute("drop table queue_service.deployments")
