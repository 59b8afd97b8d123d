"""A replica of the gateway has a row while it lives, and may ask another one about a connection that the other holds.

Phase: expand. Lock: none on a table that exists.
"""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

GATEWAYS = """
create unlogged table queue_service.gateways (
    id text primary key,
    expires_at timestamptz not null
)
"""

REQUESTS = """
create unlogged table queue_service.gateway_requests (
    -- Says which replica asks.
    id text primary key,
    -- The one that is asked.
    gateway text not null,
    expires_at timestamptz not null,
    answer text,
    body text not null,
    constraint gateway_requests_answer_check check (answer in ('applied', 'gone', 'failed'))
);
create index gateway_requests_asked_idx on queue_service.gateway_requests (gateway) where answer is null;
create index gateway_requests_expiry_idx on queue_service.gateway_requests (expires_at);
"""


def upgrade() -> None:
    op.execute(GATEWAYS)
    op.execute(REQUESTS)


def downgrade() -> None:
    op.execute("drop table queue_service.gateway_requests, queue_service.gateways")
