"""A handler may say how far its run is.

Phase: expand. Lock: `runs` exclusively for a moment.
"""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table queue_service.runs add column progress jsonb")


def downgrade() -> None:
    op.execute("alter table queue_service.runs drop column progress")
