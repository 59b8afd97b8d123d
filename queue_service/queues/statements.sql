-- Every statement about queues. A queue needs no row to be used; it has one once something about it was set.

-- define: paused
queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > (select clock_timestamp())

-- define: same_rate
(queues.rate, queues.period, queues.burst) is not distinct from (excluded.rate, excluded.period, excluded.burst)

-- name: pause
-- Claims find nothing in this queue until it is resumed, or until a time, or for so long. Row: whether this changed anything;
-- null for a time that has passed, which would end a pause that there is.
-- writes: queues
with moment as materialized (
    select clock.now, coalesce(%(until)s::timestamptz, clock.now + %(lasting)s::interval) as until
      from (select clock_timestamp() as now offset 0) as clock
), stored as (
    insert into queue_service.queues (name, paused_at, resumes_at)
    select %(name)s, moment.now, moment.until
      from moment
     where (moment.until > moment.now) is not false
        on conflict (name) do update
       set paused_at = case when {paused} then queues.paused_at else excluded.paused_at end,
           resumes_at = excluded.resumes_at
     where ({paused}) is not true or queues.resumes_at is distinct from excluded.resumes_at
    returning true
)
select case when (moment.until > moment.now) is not false then exists (select from stored) end from moment

-- name: resume
-- Row: whether this changed anything.
-- writes: queues
with before as materialized (
    select queues.name, {paused} as was_paused from queue_service.queues where queues.name = %(name)s for update
)
update queue_service.queues set paused_at = null, resumes_at = null
 where queues.name = (select before.name from before where before.was_paused)
returning true

-- name: await_claims
-- Wait for the claims that are under way, and let none begin before the end of the transaction.
lock table queue_service.leases in share row exclusive mode

-- name: count_all
-- Let what runs now count in limits, whatever its queue.
-- writes: leases
update queue_service.leases set limited = true where not limited

-- name: limit
-- Set the limits of a queue, those that are null to none. A rate that is new begins with as much saved up as there can be; one
-- that stays goes on where it is. Row: whether this changed anything.
-- writes: queues
insert into queue_service.queues (name, max_running, max_running_per_key, rate, period, burst, tokens, tokens_at)
select %(name)s, %(max_running)s, %(max_running_per_key)s, given.rate, %(period)s::interval, given.burst, given.burst,
       case when given.rate is not null then clock_timestamp() end
  from (select %(rate)s::integer as rate, %(burst)s::integer as burst) as given
    on conflict (name) do update
   set max_running = excluded.max_running, max_running_per_key = excluded.max_running_per_key, rate = excluded.rate,
       period = excluded.period, burst = excluded.burst,
       tokens = case when {same_rate} then queues.tokens else excluded.tokens end,
       tokens_at = case when {same_rate} then queues.tokens_at else excluded.tokens_at end
 where (queues.max_running, queues.max_running_per_key, queues.rate, queues.period, queues.burst)
       is distinct from
       (excluded.max_running, excluded.max_running_per_key, excluded.rate, excluded.period, excluded.burst)
returning true

-- name: widen
-- Let lanes of a queue know how many of their runs go on at once, at most `limit` of them. Row: whether any are left, for
-- there are more, or others hold them. Claims never take a lane for wider than its queue says, and one for narrower at most
-- until it is empty: an enqueue that could not see the new width when it made the lane leaves it so.
-- writes: lanes
with stale as materialized (
    select ctid from queue_service.lanes where queue = %(queue)s and width <> %(width)s limit %(limit)s + 1
), held as materialized (
    select ctid from queue_service.lanes
     where ctid = any(array(select stale.ctid from stale)) and width <> %(width)s
     limit %(limit)s for update skip locked
), widened as (
    update queue_service.lanes set width = %(width)s
     where ctid = any(array(select held.ctid from held))
    returning ctid
)
select (select count(*) from stale) > (select count(*) from widened)

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
select coalesce(used.name, queues.name), case when {paused} then queues.paused_at end,
       case when {paused} then queues.resumes_at end,
       queues.max_running, queues.max_running_per_key, queues.rate, queues.period, queues.burst
  from (select name from used union select name from laned) as used
  full join queue_service.queues on queues.name = used.name
 order by 1
