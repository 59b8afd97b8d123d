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
