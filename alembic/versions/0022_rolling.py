"""A database says which code works on it, and workers and gateways say for which revision they were built.

So code may be replaced one process at a time: a migration that takes something away can name who still uses it, and code
that is too old by then is refused where it enters the roster.

Phase: expand. Lock: `workers`, `gateways` and `alembic_version` exclusively, for a moment.
"""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

# 0013 was the last revision that took something away.
COLUMNS = """
alter table queue_service.alembic_version add column oldest_code text not null default '0013';
alter table queue_service.workers add column revision text;
alter table queue_service.gateways add column revision text;
"""

# Code that says nothing is of 0021 or before. A migration that has taken the table is waited for first, and what it has
# committed is seen: each statement in here has a snapshot of its own.
FUNCTION = """
create function queue_service.refuse_old_code() returns trigger language plpgsql set search_path = '' as $$
declare
    code text not null := coalesce(new.revision, '0021');
    oldest text;
begin
    select v.oldest_code into oldest from queue_service.alembic_version as v;
    if (code collate "C" >= oldest collate "C") is not true then
        raise exception using message = concat(
            'This process was built for revision ', code, ' of the schema queue_service, or before, and the database has ',
            'been migrated to one for versions built for ', coalesce(oldest, 'none'), ' or later. Start a newer version');
    end if;
    return new;
end
$$;
create trigger workers_refuse_old before insert on queue_service.workers
    for each row execute function queue_service.refuse_old_code();
-- A gateway enters itself again with each beat: only one that was not there is refused.
create trigger gateways_refuse_old after insert on queue_service.gateways
    for each row execute function queue_service.refuse_old_code();
"""


def upgrade() -> None:
    op.execute(COLUMNS)
    op.execute(FUNCTION)


def downgrade() -> None:
    op.execute("drop trigger gateways_refuse_old on queue_service.gateways")
    op.execute("drop trigger workers_refuse_old on queue_service.workers")
    op.execute("drop function queue_service.refuse_old_code()")
    op.execute("alter table queue_service.gateways drop column revision")
    op.execute("alter table queue_service.workers drop column revision")
    op.execute("alter table queue_service.alembic_version drop column oldest_code")
