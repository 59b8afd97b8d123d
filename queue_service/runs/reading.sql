-- Looking at runs: live ones are in `runs`, endings in `finished_runs`.

-- define: read_columns
-- A run as the library reads it, from either of the two places below.
id, queue, task, state, payload::text, attempt, failures, losses, priority, created_at, run_at, expires_at, claimed_at,
    finished_at, worker_id, max_attempts, retry_delay, timeout, singleton_key, ordering_key, organization_id,
    metadata::text, result::text, error::text, cancel_requested, attempts::text, progress::text

-- define: live_as_read
select id, queue, task, state, payload, attempt, failures, losses, priority, created_at, run_at, expires_at, claimed_at,
           null::timestamptz as finished_at,
           (select leases.worker_id from queue_service.leases where leases.id = runs.lease_id) as worker_id,
           max_attempts, retry_delay, timeout, singleton_key, ordering_key, organization_id,
           metadata, null::jsonb as result, error, cancel_requested, attempts, progress
      from queue_service.runs

-- define: finished_as_read
select id, queue, task, state, payload, attempt, failures, losses, priority, created_at, run_at, expires_at, claimed_at,
           finished_at, worker_id, max_attempts, retry_delay, timeout, singleton_key, ordering_key, organization_id,
           metadata, result, error, false, attempts, null::jsonb
      from queue_service.finished_runs

-- name: get_recent
-- A run that is live, or has ended in the last three days. `now()` does not change within a statement, and so the partitions
-- before are left out before any of them is opened: with 400 of them, that is most of what `get` costs.
select {read_columns} from (
    {live_as_read} where id = %(run_id)s
    union all
    {finished_as_read} where id = %(run_id)s and finished_at > now() - interval '3 days'
) as run
limit 1

-- name: get
-- A run, wherever it is.
select {read_columns} from (
    {live_as_read} where id = %(run_id)s
    union all
    {finished_as_read} where id = %(run_id)s
) as run
limit 1

-- name: get_many
-- These runs, wherever they are, in no order. One that is moving between places may come from both, or from neither.
select {read_columns} from (
    {live_as_read} where id = any(%(run_ids)s::bigint[])
    union all
    {finished_as_read} where id = any(%(run_ids)s::bigint[])
) as run

-- name: endings
-- Those of these runs that have ended, and those that do not exist (null).
select asked.id, ending.state
  from pg_catalog.unnest(%(run_ids)s::bigint[]) as asked (id)
  left join lateral (
    select true as found from queue_service.runs where runs.id = asked.id limit 1
  ) as live on true
  left join lateral (
    select finished_runs.state from queue_service.finished_runs where finished_runs.id = asked.id limit 1
  ) as ending on true
 where live.found is null

-- name: hidden_from
-- The role of this session, if row security hides runs from it.
select current_user::text where not queue_service.sees_all_runs()

-- name: page
-- Runs by descending id, below `before`: one page of a listing, from the places that are named. Of these no more than
-- `scan_limit` runs are looked at, however few of them fit. Rows: those that fit, and the last one that was looked at if
-- there may be more below it; the last two columns say so. Each place is an ordered walk with a limit of its own, or the
-- planner would sort all of history. Those that are running are found by their leases: there may be a million queued ones.
select {read_columns}, is_fitting, place = %(scan_limit)s from (
    select looked.*, row_number() over (order by id desc) as place,
           (%(state)s::text is null or state = %(state)s) and (%(queue)s::text is null or queue = %(queue)s)
               and (%(task)s::text is null or task = %(task)s) as is_fitting
      from (
        ({live_as_read} where %(live)s::boolean and id < %(before)s order by id desc limit %(scan_limit)s)
        union all
        ({live_as_read} where %(running)s::boolean and id < %(before)s
            and id = any(array(select pg_catalog.unnest(run_ids) from queue_service.leases))
          order by id desc limit %(scan_limit)s)
        union all
        ({finished_as_read} where %(finished)s::boolean and id < %(before)s order by id desc limit %(scan_limit)s)
        union all
        ({finished_as_read} where %(unsuccessful)s::boolean and state <> 'succeeded' and state = %(state)s
            and id < %(before)s order by id desc limit %(scan_limit)s)
        order by id desc limit %(scan_limit)s
      ) as looked
) as placed
 where is_fitting or place = %(scan_limit)s
 order by id desc
 limit %(limit)s

-- name: depth
-- What there is of a queue, each count stopping at `most`: queued and due, queued for later, running; the oldest due.
select (select count(*) from (
            (select from queue_service.runs
              where queue = %(queue)s and state = 'queued' and ordering_key is null
                and run_at <= clock_timestamp() limit %(most)s)
            union all
            (select from queue_service.runs
              where queue = %(queue)s and state = 'queued' and ordering_key is not null
                and run_at <= clock_timestamp() limit %(most)s)
            limit %(most)s) as due),
       (select count(*) from (
            (select from queue_service.runs
              where queue = %(queue)s and state = 'queued' and ordering_key is null
                and run_at > clock_timestamp() limit %(most)s)
            union all
            (select from queue_service.runs
              where queue = %(queue)s and state = 'queued' and ordering_key is not null
                and run_at > clock_timestamp() limit %(most)s)
            limit %(most)s) as later),
       (select count(*) from queue_service.runs
         where id = any(array(select pg_catalog.unnest(run_ids) from queue_service.leases)) and queue = %(queue)s
           and state = 'running'),
       least((select min(run_at) from (select run_at from queue_service.runs where queue = %(queue)s and state = 'queued'
                                          and run_at <= clock_timestamp() and ordering_key is null
                                        order by queue, priority desc, run_at, id + 0 limit 1) as first),
             (with recursive waiting (task, next_at) as (
                    (select task, next_at from queue_service.lanes where queue = %(queue)s and running < width
                      order by queue, task, next_at limit 1)
                    union all
                    select following.task, following.next_at
                      from waiting
                     cross join lateral (
                        select lanes.task, lanes.next_at from queue_service.lanes
                         where lanes.queue = %(queue)s and lanes.task > waiting.task and lanes.running < lanes.width
                         order by lanes.queue, lanes.task, lanes.next_at limit 1
                     ) as following
              )
              select min(waiting.next_at) from waiting where waiting.next_at <= clock_timestamp()))
