-- Lanes that nobody has told of what became of their runs: `tend_lanes` (migration 0017) looks, and writes down what is so.

-- name: tend_lanes
-- Look at the lanes of these queues that claims would take from, at most `limit` of each queue and task. Row: how many were
-- changed.
-- writes: lanes
select queue_service.tend_lanes(pg_catalog.array_agg(lane.queue), pg_catalog.array_agg(lane.ordering_key))
  from pg_catalog.unnest(%(queues)s::text[]) as asked (queue)
 cross join {known}
 cross join lateral (
    select lanes.queue, lanes.ordering_key from queue_service.lanes
     where lanes.queue = asked.queue and lanes.task = known.task and lanes.running < lanes.width
       and lanes.next_at <= (select clock_timestamp()) and {lane_is_for_us}
     order by lanes.queue, lanes.task, lanes.next_at limit %(limit)s
 ) as lane

-- name: tend_after
-- Look at the lanes that come after one, at most `limit`. Row: the last of them, and how many
-- were changed; none: there are no more.
-- writes: lanes
select max(looked.queue), max(looked.ordering_key) filter (where looked.queue = looked.last_queue),
       queue_service.tend_lanes(pg_catalog.array_agg(looked.queue), pg_catalog.array_agg(looked.ordering_key))
  from (
    select lanes.queue, lanes.ordering_key, max(lanes.queue) over () as last_queue
      from (select lanes.queue, lanes.ordering_key from queue_service.lanes
             where (lanes.queue, lanes.ordering_key) > (%(after_queue)s, %(after_key)s)
             order by lanes.queue, lanes.ordering_key limit %(limit)s) as lanes
  ) as looked
having count(*) > 0

-- name: make_lanes
-- For runs that were stored while triggers did not fire, as a restore of data alone may do. Rows: those that were missing.
-- Whoever does not see all runs makes none: of those that are running it would count too few.
-- writes: lanes
insert into queue_service.lanes (queue, ordering_key, next_at, width, running)
select asked.queue, asked.ordering_key, clock_timestamp(),
       coalesce((select queues.max_running_per_key from queue_service.queues where queues.name = asked.queue), 1),
       (select count(*) from queue_service.runs
         where runs.queue = asked.queue and runs.ordering_key = asked.ordering_key and runs.state = 'running')
  from (select distinct queue, ordering_key from unnest(%(queues)s::text[], %(keys)s::text[]) as each (queue, ordering_key)
         order by queue, ordering_key) as asked
 where (select queue_service.sees_all_runs())
    on conflict (queue, ordering_key) do nothing
returning queue, ordering_key
