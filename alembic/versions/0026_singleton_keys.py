"""A singleton key is one of an organization, and of no other.

The index that held a key for all organizations goes. Every enqueue of the version before this one names its columns, and
would be refused from here on: no process of that version may be left.

Phase: contract. Lock: `runs` exclusively, for a moment.
"""

from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("drop index queue_service.runs_singleton_idx")


def downgrade() -> None:
    # Refused, with all of the downgrade, while live runs of two organizations have one key.
    op.execute(
        "create unique index runs_singleton_idx on queue_service.runs (queue, singleton_key) "
        "where singleton_key is not null"
    )
