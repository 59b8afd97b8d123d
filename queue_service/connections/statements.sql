-- Every statement about connections. One process at a time holds a connection, for as long as it renews its lease.

-- name: hold
-- Hold a channel's connection, unless another process holds it. Row: the owner. None: another process holds it.
-- writes: connections
insert into queue_service.connections as held (platform, channel_id, owner, expires_at)
values (%(platform)s, %(channel_id)s, %(owner)s, clock_timestamp() + %(lease)s::interval)
    on conflict (platform, channel_id) do update set owner = excluded.owner, expires_at = excluded.expires_at
 where held.owner = excluded.owner or held.expires_at < clock_timestamp()
returning owner

-- name: renew
-- Push the deadline of these connections. Rows: platform and channel of those that the process still held.
-- writes: connections
update queue_service.connections set expires_at = clock_timestamp() + %(lease)s::interval
 where owner = %(owner)s
   and (platform, channel_id) in (select * from unnest(%(platforms)s::text[], %(channel_ids)s::text[]))
returning platform, channel_id

-- name: release
-- Release these connections. Rows: platform and channel of those that the process held.
-- writes: connections
delete from queue_service.connections
 where owner = %(owner)s
   and (platform, channel_id) in (select * from unnest(%(platforms)s::text[], %(channel_ids)s::text[]))
returning platform, channel_id

-- name: owner
-- Row: the process that holds a channel's connection (null: nobody does, or the lease has lapsed), and the time.
select (select owner from queue_service.connections
         where platform = %(platform)s and channel_id = %(channel_id)s and expires_at > clock_timestamp()),
       clock_timestamp()

-- name: prune
-- Delete the connections whose lease lapsed longer than `age` ago.
-- writes: connections
delete from queue_service.connections where expires_at < clock_timestamp() - %(age)s::interval
