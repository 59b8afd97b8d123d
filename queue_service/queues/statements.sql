-- Every statement about queues. A queue needs no row to be used. It has one as soon as something about it was set.

-- define: is_paused
-- Whether a row of `queues` says that the queue is paused now.
queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > (select clock_timestamp())

-- name: pause
-- Pause a queue: claims find nothing in it until it is resumed, or until the time `until`, or for as long as `lasting`. Row:
-- whether this changed anything. Null: that time has passed, and nothing changed, since it would end a pause that there is.
-- writes: queues
with pause as materialized (
    select moment.now, coalesce(%(until)s::timestamptz, moment.now + %(lasting)s::interval) as until
      from (select clock_timestamp() as now offset 0) as moment
), stored as (
    insert into queue_service.queues (name, paused_at, resumes_at)
    select %(name)s, pause.now, pause.until
      from pause
     where (pause.until > pause.now) is not false
        on conflict (name) do update
       set paused_at = case when {is_paused} then queues.paused_at else excluded.paused_at end,
           resumes_at = excluded.resumes_at
     where ({is_paused}) is not true or queues.resumes_at is distinct from excluded.resumes_at
    returning true
)
select case when (pause.until > pause.now) is not false then exists (select from stored) end from pause

-- name: resume
-- End the pause of a queue. Row: true. None: it was not paused, and nothing changed.
-- writes: queues
with before as materialized (
    select queues.name, {is_paused} as was_paused from queue_service.queues where queues.name = %(name)s for update
)
update queue_service.queues set paused_at = null, resumes_at = null
 where queues.name = (select before.name from before where before.was_paused)
returning true

-- name: await_claims
-- Wait for the claims that are under way. No other can begin before the end of the caller's transaction.
lock table queue_service.leases in share row exclusive mode

-- name: count_all
-- Make all runs that are running now count in limits, whatever their queue.
-- writes: leases
update queue_service.leases set limited = true where not limited

-- name: limit
-- Set the limits of a queue; null means no limit. A new rate begins with a full burst; a rate that stays keeps its tokens.
-- Row: true. None: the queue had these limits already, and nothing changed.
-- writes: queues
insert into queue_service.queues (name, max_running, max_running_per_key, rate, period, burst, tokens, tokens_at)
select %(name)s, %(max_running)s, %(max_running_per_key)s, given.rate, %(period)s::interval, given.burst, given.burst,
       case when given.rate is not null then clock_timestamp() end
  from (select %(rate)s::integer as rate, %(burst)s::integer as burst) as given
    on conflict (name) do update
   set max_running = excluded.max_running, max_running_per_key = excluded.max_running_per_key, rate = excluded.rate,
       period = excluded.period, burst = excluded.burst,
       tokens = case when (queues.rate, queues.period, queues.burst)
                          is not distinct from (excluded.rate, excluded.period, excluded.burst)
                     then queues.tokens else excluded.tokens end,
       tokens_at = case when (queues.rate, queues.period, queues.burst)
                             is not distinct from (excluded.rate, excluded.period, excluded.burst)
                        then queues.tokens_at else excluded.tokens_at end
 where (queues.max_running, queues.max_running_per_key, queues.rate, queues.period, queues.burst)
       is distinct from
       (excluded.max_running, excluded.max_running_per_key, excluded.rate, excluded.period, excluded.burst)
returning true

-- name: widen
-- Write the width of a queue's lanes, which is how many runs of a lane may be running at once: in at most `limit` lanes that
-- have another. Row: whether lanes are left, because there are more or because other sessions hold them. A claim never takes
-- a lane for wider than its queue says. A lane may stay too narrow until it is empty: an enqueue that could not see the new
-- width when it made the lane has written the old one.
-- writes: lanes
with other_widths as materialized (
    select ctid from queue_service.lanes where queue = %(queue)s and width <> %(width)s limit %(limit)s + 1
), free_lanes as materialized (
    select ctid from queue_service.lanes
     where ctid = any(array(select other_widths.ctid from other_widths)) and width <> %(width)s
     limit %(limit)s for update skip locked
), widened as (
    update queue_service.lanes set width = %(width)s
     where ctid = any(array(select free_lanes.ctid from free_lanes))
    returning ctid
)
select (select count(*) from other_widths) > (select count(*) from widened)

-- name: listed
-- All queues that have a row or a live run, by name. The names are found by hopping along an index, with one descent for
-- each: those of runs without an ordering key along the claim index, those of lanes along the key of `lanes`.
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
select coalesce(used.name, queues.name), case when {is_paused} then queues.paused_at end,
       case when {is_paused} then queues.resumes_at end,
       queues.max_running, queues.max_running_per_key, queues.rate, queues.period, queues.burst
  from (select name from used union select name from laned) as used
  full join queue_service.queues on queues.name = used.name
 order by 1
