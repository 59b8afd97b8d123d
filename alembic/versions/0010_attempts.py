"""The attempts that failed or lost their worker are kept with their run; a lease names the tasks whose runs end with it.

Both are null where there is nothing to say, so that ordinary runs and leases carry nothing more.

Phase: expand. Lock: `runs`, `finished_runs` and `leases` exclusively for a moment.
"""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("alter table queue_service.leases add column final_tasks text[]")
    op.execute("alter table queue_service.runs add column attempts jsonb")
    op.execute("alter table queue_service.finished_runs add column attempts jsonb")


def downgrade() -> None:
    op.execute("alter table queue_service.finished_runs drop column attempts")
    op.execute("alter table queue_service.runs drop column attempts")
    op.execute("alter table queue_service.leases drop column final_tasks")
