"""A paused queue may say when it goes on by itself.

Phase: expand. Lock: `queues` exclusively for a moment.
"""

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table queue_service.queues add column resumes_at timestamptz")


def downgrade() -> None:
    op.execute("alter table queue_service.queues drop column resumes_at")
