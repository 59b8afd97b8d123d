"""What is made in the schema belongs to its owner, whoever makes it: it is made in the owner's name by a role that may take
it, for the length of a transaction. Otherwise the owner could not change it afterwards."""

from __future__ import annotations

# Whether we may act as the role `owner`. A role that was chosen by `options` must be a member of it, too, and not only the
# one that logged in: who chose it wants no more than its rights. (`SET` is not known to Postgres 15.)
MAY_BE_OWNER = """(
    select pg_catalog.bool_and(pg_catalog.pg_has_role(me, owner.oid, case
               when pg_catalog.current_setting('server_version_num')::integer < 160000 then 'MEMBER' else 'SET' end))
      from (values (current_user), (session_user)) as us (me))
"""

# Act as the owner of the schema to the end of the transaction, where we may. Not where a part of it is somebody else's: the
# owner could change less than we can.
BE_OWNER = f"""
select pg_catalog.set_config('role', owner.rolname, true)
  from pg_catalog.pg_namespace as ours join pg_catalog.pg_roles as owner on owner.oid = ours.nspowner
 where ours.nspname = 'queue_service' and owner.rolname <> current_user and {MAY_BE_OWNER}
   and not exists (select from pg_catalog.pg_class
                    where relnamespace = ours.oid and not pg_catalog.pg_has_role(owner.oid, relowner, 'USAGE'))
   and not exists (select from pg_catalog.pg_proc
                    where pronamespace = ours.oid and not pg_catalog.pg_has_role(owner.oid, proowner, 'USAGE'))
"""  # noqa: S608 - constants
