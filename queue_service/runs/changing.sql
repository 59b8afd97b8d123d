-- What clients, operators and the sweeper do to runs that no worker holds: cancel, expire, retry, delete.

-- name: cancel
-- A queued run ends `cancelled`; a running one is marked for its worker. One whose lease does not exist any more (`orphans`
-- says how) has no worker, and ends, too. Row: 'cancelled' or 'requested'; none if no live run has this id. The row is
-- locked before its state is looked at, so that a claim cannot slip between.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with target as materialized (
    select case when state = 'running' and claimed_at < clock_timestamp() - interval '1 minute'
                     and lease_id not in (select leases.id from queue_service.leases)
                then 'queued' else state end as state
      from queue_service.runs where id = %(run_id)s for update
), gone as (
    delete from queue_service.runs
     where id = %(run_id)s and (select target.state from target) = 'queued'
    returning runs.*
), over as materialized (
    select id, metadata -> 'turn'::text as turn, 'cancelled' as state, coalesce(error, pg_catalog.jsonb_build_object(
               'reason', 'cancelled', 'message', 'It was cancelled before it started.')) as error
      from gone where metadata ? 'turn'::text
), {end_turns}, {leave_lanes}, ended as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at, null, attempt, failures, losses, max_attempts, priority,
           'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout,
           metadata, null,
           coalesce(error, pg_catalog.jsonb_build_object(
               'reason', 'cancelled', 'message', 'It was cancelled before it started.')),
           attempts
      from gone
    returning id
), asked as (
    update queue_service.runs set cancel_requested = true
     where id = %(run_id)s and (select target.state from target) = 'running'
    returning id
)
select 'cancelled' from ended where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
union all select 'requested' from asked

-- name: take_back
-- A turn's run that was never begun ends `cancelled`, and the turn with it. Row: its id; none where it was begun, or is no
-- more.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with target as materialized (
    select runs.id from queue_service.runs
     where runs.id = (select m.run_id from queue_service.turn_markers as m
                       where m.deployment = %(deployment)s and m.message_id = %(message_id)s)
       and runs.state = 'queued' and runs.attempt = 0
       for update
), gone as (
    delete from queue_service.runs where id = any(array(select target.id from target)) returning runs.*
), over as materialized (
    select id, metadata -> 'turn'::text as turn, 'cancelled' as state,
           pg_catalog.jsonb_build_object('reason', 'cancelled', 'message', 'The message was taken back.') as error
      from gone where metadata ? 'turn'::text
), {end_turns}, {leave_lanes}, ended as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at, null, attempt, failures, losses, max_attempts, priority,
           'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout,
           metadata, null,
           pg_catalog.jsonb_build_object('reason', 'cancelled', 'message', 'The message was taken back.'), attempts
      from gone
    returning id
)
select id from ended where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0

-- define: end_late
-- Ends those of the runs `passable` whose time to start has passed. The guard is spelt with coalesce, or the index on
-- expires_at could serve the look by id, and would be walked from end to end.
gone as (
    delete from queue_service.runs
     where id = any(array(select passable.id from passable))
       and state = 'queued' and coalesce(expires_at, 'infinity') < clock_timestamp()
    returning id, run_at, created_at, expires_at, claimed_at, null::bigint, attempt, failures, losses, max_attempts,
              priority, 'expired' as state, queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay,
              timeout, metadata, null::jsonb,
              coalesce(error, pg_catalog.jsonb_build_object(
                  'reason', 'expired', 'message', 'It was not started in time.')), attempts
), over as materialized (
    select id, metadata -> 'turn'::text as turn, state, null::jsonb as error from gone where metadata ? 'turn'::text
), {end_turns}, {leave_lanes}
insert into queue_service.finished_runs ({history_columns})
select * from gone where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
returning id

-- name: expire
-- End queued runs whose time to start has passed, at most `limit` of them; those of a lane that another session has locked
-- are left for later. Rows: run ids.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with late as materialized (
    select id, queue, ordering_key from queue_service.runs
     where expires_at < (select clock_timestamp()) and state = 'queued'
     order by expires_at limit %(limit)s for update skip locked
), passable as materialized (
    select late.id from late where late.ordering_key is null
    union all
    select late.id
      from late
     cross join lateral (
        select from queue_service.lanes
         where lanes.queue = late.queue and lanes.ordering_key = late.ordering_key
           for update skip locked
     ) as lane
), {end_late}

-- name: expire_one
-- As `expire`, this one.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with passable as materialized (
    select id from queue_service.runs where id = %(run_id)s and state = 'queued' for update
), {end_late}

-- name: late
-- Runs that `expire` would end, whoever has locked them. Rows: run ids.
select id from queue_service.runs
 where expires_at < (select clock_timestamp()) and state = 'queued'
 order by expires_at limit %(limit)s

-- define: stored_again
-- Makes `stored`: of `taken` from history those whose singleton key no live run holds are runs again.
stored as (
    insert into queue_service.runs (id, created_at, attempt, max_attempts, priority, queue, task, payload, singleton_key,
                                    ordering_key, organization_id, retry_delay, timeout, metadata, error, attempts)
    select id, created_at, attempt, max_attempts, priority, queue, task, payload, singleton_key, ordering_key,
           organization_id, retry_delay, timeout, metadata, error,
           case when claimed_at is null then attempts else (
               select {attempts_and_this}
                 from (select taken.worker_id, taken.finished_at as ended_at, taken.error) as this) end
      from taken
     order by queue, ordering_key, id
        on conflict do nothing
    returning id, queue, priority
)

-- name: retry
-- Move a run that failed, was cancelled or expired back to its queue, due now, its counters fresh. The attempt goes on
-- counting, so that no old claim fits it; the last one, which its own columns described, joins those kept with the run.
-- Row: queue, priority, singleton key, organization, and whether it has moved; none if there is no such run in history. It
-- stays where it is while a live run has its singleton key: to raise that as an error would end the transaction of a caller.
-- As in `retry_many`, its row is locked first, and goes once it is stored.
-- writes: runs, finished_runs
with taken as materialized (
    select * from queue_service.finished_runs
     where id = %(run_id)s and state in ('failed', 'cancelled', 'expired')
       for update
), {stored_again}, gone as (
    delete from queue_service.finished_runs
     where id = (select stored.id from stored) and finished_at = (select taken.finished_at from taken)
    returning id
)
select queue, priority, singleton_key, organization_id, (select count(*) from gone) > 0 from taken

-- define: stretch
-- Makes `moment`, the times asked for, and `stretch`, where the next `scan_limit` runs that ended like this come to an end.
moment as materialized (
    select asked.until, coalesce(%(since)s::timestamptz, asked.until - %(within)s::interval, '-infinity') as since
      from (select coalesce(%(until)s::timestamptz, clock_timestamp()) as until offset 0) as asked
), stretch as materialized (
    select max(id) as last
      from (select id from queue_service.finished_runs
             where state <> 'succeeded' and state = %(state)s and id > %(after)s
               and finished_at >= (select date_trunc('day', moment.since, 'UTC') from moment)
             order by id limit %(scan_limit)s) as following
)

-- name: retry_many
-- As `retry`, the runs of history that ended in a state that is not success, of a queue, a task and a time: the oldest
-- first, at most `limit` of the next `scan_limit`, for what is chosen may be rare among what there is. One whose singleton
-- key a live run holds stays where it is, and so does one that somebody else is moving. Row: the time up to which runs are
-- chosen, where to go on (null: nowhere), how many were found, how many of those moved, and the notices. Of the partitions
-- only those are read in which something can have ended since the time asked for: so the stretch compares the day.
-- Their rows are locked first, and go once they are stored: a delete that feeds the insert would lose what conflicts. It
-- reads the partitions between the times of what was found, and does not say the state once more: before Postgres 18 the
-- walk's own index would serve it, and be read from end to end.
-- writes: runs, finished_runs
with {stretch}, taken as materialized (
    select * from queue_service.finished_runs
     where state <> 'succeeded' and state = %(state)s and id > %(after)s and id <= (select stretch.last from stretch)
       and finished_at >= (select moment.since from moment) and finished_at <= (select moment.until from moment)
       and (%(queue)s::text is null or queue = %(queue)s) and (%(task)s::text is null or task = %(task)s)
     order by id limit %(limit)s
       for update skip locked
), {stored_again}, gone as (
    delete from queue_service.finished_runs
     where id = any(array(select stored.id from stored))
       and finished_at >= (select min(taken.finished_at) from taken)
       and finished_at <= (select max(taken.finished_at) from taken)
    returning id
)
select moment.until,
       case when (select count(*) from taken) < %(limit)s then stretch.last else (select max(taken.id) from taken) end,
       (select count(*) from taken), (select count(*) from gone),
       array(select distinct stored.priority::text || ' ' || stored.queue from stored)
  from moment, stretch

-- name: count_many
-- How many `retry_many` would find, at most `limit`. Row: as there, without the last two.
with {stretch}
select moment.until, stretch.last,
       (select count(*) from (
            select from queue_service.finished_runs
             where state <> 'succeeded' and state = %(state)s and id > %(after)s and id <= (select stretch.last from stretch)
               and finished_at >= (select moment.since from moment) and finished_at <= (select moment.until from moment)
               and (%(queue)s::text is null or queue = %(queue)s) and (%(task)s::text is null or task = %(task)s)
             limit %(limit)s) as fitting)
  from moment, stretch

-- name: delete
-- Forget a run that is queued or finished. Row: its id; none if it is running or unknown.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with gone as (
    delete from queue_service.runs where id = %(run_id)s and state = 'queued'
    returning id, queue, ordering_key, state, metadata -> 'turn'::text as turn
), over as materialized (
    select id, turn, 'deleted' as state, null::jsonb as error from gone where turn is not null
), {end_turns}, {leave_lanes}, finished as (
    delete from queue_service.finished_runs where id = %(run_id)s returning id
)
select id from gone where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
union all
select id from finished

-- name: purge
-- Forget queued runs of a queue, at most `limit` of them. Row: how many went.
-- writes: runs, turn_markers, turn_outcomes, streams, events, lanes
with gone as (
    delete from queue_service.runs
     where id = any(array(select id from queue_service.runs
                           where queue = %(queue)s and state = 'queued' and ordering_key is null
                           order by queue, priority desc, run_at, id + 0 limit %(limit)s for update skip locked)
                    operator(pg_catalog.||) array(select id from queue_service.runs
                              where queue = %(queue)s and state = 'queued' and ordering_key is not null
                              order by queue, ordering_key, id limit %(limit)s for update skip locked))
       and state = 'queued'
    returning id, queue, ordering_key, state, metadata -> 'turn'::text as turn
), over as materialized (
    select id, turn, 'deleted' as state, null::jsonb as error from gone where turn is not null
), {end_turns}, {leave_lanes}
select count(*) from gone where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
