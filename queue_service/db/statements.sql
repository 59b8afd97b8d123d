-- Statements that belong to no aggregate.

-- name: notify
-- Send notices as part of the caller's transaction: they go out when it commits.
select pg_notify(notice.channel, notice.payload)
  from unnest(%(channels)s::text[], %(payloads)s::text[]) as notice (channel, payload)

-- name: notify_alone
-- Send notices in a transaction of their own, which holds nothing worth waiting for a disk: a commit that notifies
-- takes a lock shared by the whole server, and must not hold it through a flush.
select set_config('synchronous_commit', 'off', true), pg_notify(notice.channel, notice.payload)
  from unnest(%(channels)s::text[], %(payloads)s::text[]) as notice (channel, payload)

-- name: place
-- Whose the schema is, which database this is, and as whom we look.
select pg_catalog.pg_get_userbyid(namespace.nspowner)::text, pg_catalog.current_database()::text, current_user::text
  from pg_catalog.pg_namespace as namespace
 where namespace.nspname = 'queue_service'

-- name: belongings
-- The schema and what is in it, as `alter … owner` names it, with its owner. What goes with a table (its indexes, its row type,
-- the sequences of its columns) is not named. The schema comes first: then its new owner may have things in it.
select found.what, pg_catalog.pg_get_userbyid(found.owner)::text
  from (
    select 0 as place, 'schema queue_service' as what, nspowner as owner
      from pg_catalog.pg_namespace where nspname = 'queue_service'
     union all
    select 1, pg_catalog.format('%%s queue_service.%%I',
                     case relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence'
                                  when 'f' then 'foreign table' when 'c' then 'type' else 'table' end, relname), relowner
      from pg_catalog.pg_class
     where relnamespace = 'queue_service'::regnamespace and relkind in ('r', 'p', 'v', 'm', 'S', 'f', 'c')
       and not (relkind = 'S' and exists (
           select from pg_catalog.pg_depend as goes where goes.classid = 'pg_catalog.pg_class'::regclass
              and goes.objid = pg_class.oid and goes.deptype in ('a', 'i')))
     union all
    select 2, pg_catalog.format('type queue_service.%%I', typname), typowner
      from pg_catalog.pg_type
     where typnamespace = 'queue_service'::regnamespace and typtype not in ('b', 'c', 'm', 'p')
     union all
    select 3, pg_catalog.format('%%s queue_service.%%I(%%s)', case prokind when 'p' then 'procedure' when 'a' then 'aggregate'
                     else 'function' end, proname, pg_catalog.pg_get_function_identity_arguments(oid)), proowner
      from pg_catalog.pg_proc where pronamespace = 'queue_service'::regnamespace
  ) as found
 order by found.place, found.what

-- name: unlike
-- Those of the settings that were set in this transaction whose sessions begin with something else. Besides, commits that are
-- acknowledged before they are safe, and transactions that may not take as long as they need. Values are as the server
-- writes them: what a session begins with, and what it is to begin with.
select name, reset_val, setting from pg_catalog.pg_settings where name = any(%(names)s::text[]) and reset_val <> setting
 union all
select name, reset_val, case name when 'synchronous_commit' then 'on' else '0' end
  from pg_catalog.pg_settings
 where (name = 'synchronous_commit' and reset_val = 'off') or (name = 'transaction_timeout' and reset_val <> '0')
