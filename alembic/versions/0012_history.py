"""What did not succeed is found in history without reading what did.

Phase: expand. Lock: a partition of history against writers while its index is built, half a second for a million runs;
today's, the only one that is written to, after those before it. The parent for a moment, since it takes over what is there.
"""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

UPGRADE = """
do $$
declare
    part regclass;
begin
    for part in select inhrelid::regclass from pg_inherits join pg_class on pg_class.oid = inhrelid
                 where inhparent = 'queue_service.finished_runs'::regclass order by relname loop
        execute 'create index on ' || part || ' (state, id) where state <> ''succeeded''';
    end loop;
end
$$;

create index finished_runs_unsuccessful_idx on queue_service.finished_runs (state, id) where state <> 'succeeded';
"""


def upgrade() -> None:
    op.execute(UPGRADE)


def downgrade() -> None:
    op.execute("drop index queue_service.finished_runs_unsuccessful_idx")
