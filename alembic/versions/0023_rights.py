"""Whoever may store a run needs no rights on lanes: the trigger functions that keep them have those of their owner.

They cannot be called, but whoever may execute one can make a trigger of it on a table of their own, and would write to our
lanes in the owner's name. So nobody but the owner may; a trigger that is there fires for whoever writes the table.

Phase: expand. Lock: none but on the functions.
"""

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

FUNCTIONS = ("join_lane", "move_lane")

# The owner of the table may do with lanes what the functions do, whoever had the functions until now.
OWNED = """
do $$
declare
    keeper regrole := (select relowner from pg_catalog.pg_class where oid = 'queue_service.lanes'::regclass);
    kept regprocedure;
begin
    for kept in select oid from pg_catalog.pg_proc
                 where oid in ('queue_service.join_lane()'::regprocedure, 'queue_service.move_lane()'::regprocedure)
                   and proowner <> keeper loop
        execute 'alter function ' || kept || ' owner to ' || keeper;
    end loop;
end
$$;
"""

# Also from those to whom `grant execute on all functions` was once given.
REVOKED = """
do $$
declare
    given record;
begin
    for given in select proc.oid::regprocedure as kept, case acl.grantee when 0 then 'public'
                                                        else acl.grantee::regrole::text end as grantee
                   from pg_catalog.pg_proc as proc
                  cross join lateral pg_catalog.aclexplode(
                        coalesce(proc.proacl, pg_catalog.acldefault('f', proc.proowner))) as acl
                  where proc.oid in ('queue_service.join_lane()'::regprocedure, 'queue_service.move_lane()'::regprocedure)
                    and acl.grantee <> proc.proowner loop
        execute 'revoke all on function ' || given.kept || ' from ' || given.grantee;
    end loop;
end
$$;
"""


def upgrade() -> None:
    op.execute(OWNED)
    op.execute(REVOKED)
    for name in FUNCTIONS:
        op.execute(f"alter function queue_service.{name}() security definer set search_path = pg_catalog, pg_temp")


def downgrade() -> None:
    for name in FUNCTIONS:
        op.execute(f"alter function queue_service.{name}() security invoker set search_path = ''")
        op.execute(f"grant execute on function queue_service.{name}() to public")
