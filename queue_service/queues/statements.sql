-- Every statement about queues. A queue needs no row to be used; it has one once something about it was set.

-- name: pause
-- Claims find nothing in this queue until it is resumed. Row: whether this changed anything.
-- writes: queues
insert into queue_service.queues (name, paused_at) values (%(name)s, clock_timestamp())
    on conflict (name) do update set paused_at = excluded.paused_at where queues.paused_at is null
returning true

-- name: resume
-- Row: whether this changed anything.
-- writes: queues
update queue_service.queues set paused_at = null where name = %(name)s and paused_at is not null
returning true

-- name: listed
-- Queues that have a row or a live run. Names are found by hopping along an index, one descent each: those of runs without
-- an ordering key along the claim index, those of lanes along their key.
with recursive used (name) as (
    (select queue from queue_service.runs where ordering_key is null
      order by queue, priority desc, run_at, id + 0 limit 1)
    union all
    select following.queue
      from used
     cross join lateral (
        select runs.queue from queue_service.runs where runs.queue > used.name and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1
     ) as following
), laned (name) as (
    (select queue from queue_service.lanes order by queue, ordering_key limit 1)
    union all
    select following.queue
      from laned
     cross join lateral (
        select lanes.queue from queue_service.lanes where lanes.queue > laned.name
         order by lanes.queue, lanes.ordering_key limit 1
     ) as following
)
select coalesce(used.name, queues.name), queues.paused_at
  from (select name from used union select name from laned) as used
  full join queue_service.queues on queues.name = used.name
 order by 1
