"""Why a turn was not taken up is told in the same words whatever the session's formats of times are.

Phase: expand. Lock: none.
"""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

FUNCTION = "queue_service.why_unanswered(bigint, interval)"


def upgrade() -> None:
    op.execute(f"alter function {FUNCTION} set datestyle = 'ISO' set timezone = 'UTC' set intervalstyle = 'postgres'")


def downgrade() -> None:
    op.execute(f"alter function {FUNCTION} reset datestyle reset timezone reset intervalstyle")
