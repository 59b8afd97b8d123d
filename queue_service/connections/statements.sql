-- Every statement about connections. A connection is held by one process at a time, for as long as it renews its lease.

-- define: live_owner
select owner from queue_service.connections
 where platform = %(platform)s and channel_id = %(channel_id)s and expires_at > clock_timestamp()

-- name: hold
-- Hold a channel's connection, unless another process does. Row: the owner, where it is now this one.
-- writes: connections
insert into queue_service.connections as held (platform, channel_id, owner, expires_at)
values (%(platform)s, %(channel_id)s, %(owner)s, clock_timestamp() + %(lease)s::interval)
    on conflict (platform, channel_id) do update set owner = excluded.owner, expires_at = excluded.expires_at
 where held.owner = excluded.owner or held.expires_at < clock_timestamp()
returning owner

-- name: renew
-- Push the deadline of every connection a process holds. Rows: platform and channel of those it still had.
-- writes: connections
update queue_service.connections set expires_at = clock_timestamp() + %(lease)s::interval
 where owner = %(owner)s
   and (platform, channel_id) in (select * from unnest(%(platforms)s::text[], %(channel_ids)s::text[]))
returning platform, channel_id

-- name: release
-- Let go of connections. Rows: platform and channel of those this process held.
-- writes: connections
delete from queue_service.connections
 where owner = %(owner)s
   and (platform, channel_id) in (select * from unnest(%(platforms)s::text[], %(channel_ids)s::text[]))
returning platform, channel_id

-- name: owner
-- The process that holds a channel's connection, while its lease lasts.
{live_owner}

-- name: deliver
-- Store the delivery of an event, reserved for the process that holds the channel's connection. Row: the id of the run.
-- writes: runs
insert into queue_service.runs (queue, task, payload, organization_id, reserved_for)
values ('thread_response', 'deliver', %(payload)s::jsonb, %(organization_id)s, ({live_owner}))
returning id

-- name: prune
-- Forget connections whose lease lapsed long ago.
-- writes: connections
delete from queue_service.connections where expires_at < clock_timestamp() - %(age)s::interval
