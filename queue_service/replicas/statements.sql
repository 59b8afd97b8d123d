-- Every statement about the replicas of the gateway. A replica has a row for as long as it renews its lease, and none for
-- each of its connections: their ids say which replica holds them. A request lives for a moment: its asker waits for it.
-- Both tables are unlogged: after a crash of the server, replicas enter themselves again, and who waited asks again.

-- name: beat
-- Say that this replica lives. It is entered where it is not there (any more). A trigger refuses to enter code that is too old
-- for this database by now.
-- writes: gateways
insert into queue_service.gateways as gateway (id, expires_at, revision)
values (%(id)s, clock_timestamp() + %(lease)s::interval, %(revision)s)
    on conflict (id) do update set expires_at = excluded.expires_at

-- name: leave
-- Forget this replica, and answer what it is still asked: its connections are gone. Rows: the ids of those requests.
-- writes: gateways, gateway_requests
with left_now as (
    delete from queue_service.gateways where id = %(id)s
)
update queue_service.gateway_requests set answer = 'gone'
 where gateway = %(id)s and answer is null
returning id

-- name: prune
-- Delete replicas that have not said for `silence` that they live, and requests whose time is over: their askers wait no
-- longer. What another session has locked, it deletes itself.
-- writes: gateways, gateway_requests
with silent as (
    delete from queue_service.gateways
     where id = any(array(select id from queue_service.gateways
                           where expires_at < clock_timestamp() - %(silence)s::interval
                             for update skip locked))
)
delete from queue_service.gateway_requests
 where id = any(array(select r.id from queue_service.gateway_requests as r
                       where r.expires_at < (select clock_timestamp()) - interval '5 s'
                         for update skip locked))

-- name: ask
-- Ask replicas. Rows: the ids of the requests that were stored. One that is missing names a replica that does not live.
-- writes: gateway_requests
insert into queue_service.gateway_requests (id, gateway, body, expires_at)
select given.id, given.gateway, given.body, clock_timestamp() + %(lifetime)s::interval
  from unnest(%(ids)s::text[], %(gateways)s::text[], %(bodies)s::text[]) as given (id, gateway, body)
 where exists (select from queue_service.gateways as g
                where g.id = given.gateway and g.expires_at > clock_timestamp())
returning id

-- name: asked
-- What this replica is asked and has not answered, in no order. Not what is too old: its asker has given up, and what
-- was asked since must not be undone.
select r.id, r.body
  from queue_service.gateway_requests as r
 where r.gateway = %(id)s and r.answer is null and r.expires_at > clock_timestamp()
 limit %(limit)s

-- name: answer
-- Answer requests.
-- writes: gateway_requests
update queue_service.gateway_requests set answer = %(answers)s::jsonb ->> id where id = any(%(ids)s::text[])

-- name: take_answers
-- Take the answers to these requests. Rows: id and answer of those that are answered.
-- writes: gateway_requests
delete from queue_service.gateway_requests
 where id = any(%(ids)s::text[]) and answer is not null
returning id, answer
