"""Receipts of messages: what a message was, and where in its stream it stands.

Phase: expand. Lock: none.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        """
        create table queue_service.receipts (
            deployment text not null,
            message_id text not null,
            seq        bigint not null,
            digest     text not null,
            constraint receipts_pkey primary key (deployment, message_id)
        ) with (
            autovacuum_vacuum_threshold = 1000,
            autovacuum_vacuum_scale_factor = 0.05
        )
        """
    )


def downgrade() -> None:
    op.execute("drop table queue_service.receipts")
