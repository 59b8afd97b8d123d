"""A worker says in the roster with whom it shares its work: those with the same queues and the same tasks.

They take turns in looking first when something is enqueued. A worker of an older version says nothing, and looks at once,
as it always did.

Phase: expand. Lock: `workers` exclusively, for a moment.
"""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table queue_service.workers add column fleet text")


def downgrade() -> None:
    op.execute("alter table queue_service.workers drop column fleet")
