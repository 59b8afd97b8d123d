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


# The index that comes back holds a key once for all organizations.
ONCE = """
do $$
declare
    twice record;
begin
    select queue, singleton_key, min(id) as one, max(id) as other into twice from queue_service.runs
     where singleton_key is not null group by queue, singleton_key having count(*) > 1 limit 1;
    if twice.one is not null then
        raise exception using message = concat(
            'live runs of several organizations, such as ', twice.one, ' and ', twice.other, ', have the singleton key ',
            quote_literal(twice.singleton_key), ' in queue ', quote_literal(twice.queue), ', and revision 0025 has a key ',
            'once for all of them. Cancel all of these runs but one, or wait until they have ended');
    end if;
end
$$;
"""


def upgrade() -> None:
    op.execute("drop index queue_service.runs_singleton_idx")


def downgrade() -> None:
    op.execute(ONCE)
    op.execute(
        "create unique index runs_singleton_idx on queue_service.runs (queue, singleton_key) "
        "where singleton_key is not null"
    )
