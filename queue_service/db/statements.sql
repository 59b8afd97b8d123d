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

-- name: unlike
-- Those of the settings that were set in this transaction whose sessions begin with something else. Besides, commits that are
-- acknowledged before they are safe, and transactions that may not take as long as they need. Values are as the server
-- writes them: what a session begins with, and what it is to begin with.
select name, reset_val, setting from pg_catalog.pg_settings where name = any(%(names)s::text[]) and reset_val <> setting
 union all
select name, reset_val, case name when 'synchronous_commit' then 'on' else '0' end
  from pg_catalog.pg_settings
 where (name = 'synchronous_commit' and reset_val = 'off') or (name = 'transaction_timeout' and reset_val <> '0')
