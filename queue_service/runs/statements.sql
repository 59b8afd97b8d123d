-- Every statement about runs. Live runs are in `runs`, endings in `finished_runs`; a claimed run is held by a row of
-- `leases`, which lists the runs claimed together. Locks are taken leases first, then runs by ascending id.
--
-- The planner's picture of `runs` is always out of date (vacuum may find it empty a moment before a million rows come),
-- and with zero rows expected it will read the whole table as the outer side of a join. So `runs` is never joined:
-- it is reached by `id = any(array)` or by an ordered walk along the claim index with a limit, and nothing else. That
-- index holds `id + 0`, so that the first can never be served by the second.
--
-- Runs with an ordering key are in no claim index: they stand in the lane of their queue and key, and `lanes` has a row for
-- each, kept by a trigger. A lane is claimed from while no run of it is running; what is taken is its head, the oldest run
-- that may run. Not yet in the lane is what was enqueued for later and never begun, no longer in it what has expired; a head
-- that was begun and waits for its next attempt keeps its place, and the lane waits with it. Locks: a lane before its queued
-- runs, a running run before its lane.
--
-- A queue may have a limit: how many of its runs go on at once, or how many may begin in a time. Such a queue is passed over
-- by the claims of the others, which then pay nothing for it, and has claims of its own. What runs is counted from the leases
-- that those claims marked, so that no counter can drift. The count comes from the snapshot, but nothing can have made it
-- greater since: each such claim changes `claims` of the queue's row, and one whose snapshot shows another number than the
-- row it then locks takes nothing.
--
-- A run that is `reserved_for` an owner is for a second, from its run_at on, that owner's to claim. After that it is
-- anyone's, so that an owner who died delays it and no more.
--
-- The columns of a run that is running or has ended tell of its last attempt. Those before it that failed or lost their
-- worker are in `attempts`, the last twenty, their errors shortened; null where there were none, which costs nothing.

-- define: history_columns
id, run_at, created_at, expires_at, claimed_at, worker_id, attempt, failures, losses, max_attempts, priority, state,
    queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata, result, error,
    attempts

-- define: read_columns
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

-- define: enqueue_values
(queue, task, payload, priority, run_at, expires_at, singleton_key, ordering_key, max_attempts, retry_delay, timeout,
        metadata, organization_id)
select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
       %(singleton_key)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
       %(metadata)s::jsonb, %(organization_id)s
  from (select coalesce(%(run_at)s::timestamptz,
                        clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due

-- define: held_claim
{held} and (select count(*) from freed) >= 0

-- define: held
runs.id = any(%(ids)s::bigint[])
       and runs.attempt = (%(attempts)s::integer[])[width_bucket(runs.id, %(ids)s::bigint[])]
       and runs.state = 'running'

-- define: outcome
(select %(outcomes)s::jsonb) -> (width_bucket(runs.id, %(ids)s::bigint[]) - 1)

-- define: queued_again
insert into queue_service.runs (id, created_at, attempt, max_attempts, priority, queue, task, payload, singleton_key,
                                    ordering_key, organization_id, retry_delay, timeout, metadata, error, attempts)
    select id, created_at, attempt, max_attempts, priority, queue, task, payload, singleton_key, ordering_key,
           organization_id, retry_delay, timeout, metadata, error,
           case when claimed_at is null then attempts else (
               select {attempts_and_this} from (select taken.worker_id, taken.finished_at as ended_at, taken.error) as this) end
      from taken

-- define: attempts_and_this
coalesce(case when jsonb_array_length(attempts) >= 20 then attempts - 0 else attempts end, '[]')
    || jsonb_build_object('attempt', attempt, 'worker_id', this.worker_id, 'claimed_at', claimed_at,
           'ended_at', this.ended_at, 'error', this.error || jsonb_strip_nulls(jsonb_build_object(
               'message', left(this.error ->> 'message', 1000),
               'traceback', right(this.error ->> 'traceback', 2000))))

-- define: lost
jsonb_build_object('reason', 'worker_lost', 'message', 'The worker was lost while this run was with it.')

-- define: is_final
coalesce(task = any((select lapsed.final_tasks from lapsed where lapsed.id = lease_id)::text[]), false)

-- define: moment
moment as materialized (
    select asked.until, coalesce(%(since)s::timestamptz, asked.until - %(within)s::interval, '-infinity') as since
      from (select coalesce(%(until)s::timestamptz, clock_timestamp()) as until offset 0) as asked
)

-- define: stretch
stretch as materialized (
    select max(id) as last
      from (select id from queue_service.finished_runs
             where state <> 'succeeded' and state = %(state)s and id > %(after)s
               and finished_at >= (select date_trunc('day', moment.since) from moment)
             order by id limit %(scan_limit)s) as following
)

-- define: chosen
queue_service.finished_runs
     where state <> 'succeeded' and state = %(state)s and id > %(after)s and id <= (select stretch.last from stretch)
       and finished_at >= (select moment.since from moment) and finished_at <= (select moment.until from moment)
       and (%(queue)s::text is null or queue = %(queue)s) and (%(task)s::text is null or task = %(task)s)

-- define: of_queue
select from queue_service.runs where queue = %(queue)s and state = 'queued'

-- define: from_floors
select candidate.id, floor.queue
          from unnest(%(floor_queues)s::text[], %(priorities)s::smallint[], %(floors)s::timestamptz[], %(floor_ids)s::bigint[])
            as floor (queue, priority, run_at, id)
         cross join lateral (
            select runs.id from queue_service.runs
             where runs.queue = floor.queue and runs.priority = floor.priority and runs.ordering_key is null
               and (runs.run_at, runs.id + 0) >= (floor.run_at, floor.id)
               and runs.run_at <= (select clock_timestamp())
               and runs.state = 'queued' and runs.losses = 0 and runs.task = any(%(tasks)s::text[])
               and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))
               and {for_us}
             order by runs.run_at, runs.id + 0
             limit asked.wanted
               for update skip locked
         ) as candidate
         where floor.queue = asked.queue
         limit asked.wanted

-- define: from_lanes
free as materialized (
    select chosen.*
      from asked
     cross join lateral (
        select lanes.ctid as place, lanes.queue, lanes.ordering_key from queue_service.lanes
         where lanes.queue = asked.queue and lanes.running < lanes.width and lanes.running < asked.width
           and lanes.next_at <= (select clock_timestamp())
         order by lanes.queue, lanes.next_at
         limit asked.wanted
           for update skip locked
     ) as chosen
), heads as materialized (
    select free.place, free.queue, free.ordering_key, head.id, head.run_at,
           head.run_at <= (select clock_timestamp()) as is_due, head.is_ours
      from free
      left join lateral (
        select runs.id, runs.run_at, runs.task = any(%(tasks)s::text[]) and {for_us} as is_ours
          from queue_service.runs
         where runs.queue = free.queue and runs.ordering_key = free.ordering_key and {in_lane}
         order by runs.queue, runs.ordering_key, runs.id limit 1
      ) as head on true
), picked as materialized (
    select locked.id, heads.queue
      from heads
     cross join lateral (
        -- It may have been replaced since. That it was claimed and put off would show in the row of its lane.
        select runs.id from queue_service.runs
         where runs.id = heads.id and runs.state = 'queued' and runs.run_at <= (select clock_timestamp())
           and runs.task = any(%(tasks)s::text[])
           and (runs.queue, runs.ordering_key) is not distinct from (heads.queue, heads.ordering_key)
         limit 1 for update skip locked
     ) as locked
     where heads.is_due and heads.is_ours
), later as (
    -- By their places: the rows are locked. One that this statement's snapshot does not show is looked at once more.
    update queue_service.lanes
       set next_at = (
            select case when heads.is_due then clock_timestamp() + interval '1 second'
                        else coalesce(heads.run_at, (
                            select min(runs.run_at) from queue_service.runs
                             where runs.queue = heads.queue and runs.ordering_key = heads.ordering_key
                               and runs.state = 'queued' and runs.attempt = 0
                               and runs.run_at > (select clock_timestamp())), 'infinity') end
              from heads where heads.place = lanes.ctid)
     where lanes.ctid = any(array(
            select heads.place from heads where (heads.is_due and heads.is_ours) is not true))
)

-- define: unlocked
unlocked as materialized (
    select runs.id from queue_service.runs
     where runs.id = any(array(select mine.id from mine)) and runs.state = 'running'
     order by runs.id
       for update skip locked
), passable as materialized (
    select lane.queue, lane.ordering_key
      from mine
     cross join lateral (
        select lanes.queue, lanes.ordering_key from queue_service.lanes
         where lanes.queue = mine.queue and lanes.ordering_key = mine.ordering_key
           for update skip locked
     ) as lane
)

-- define: locked
mine.id not in (select unlocked.id from unlocked)
    or mine.ordering_key is not null
       and (mine.queue, mine.ordering_key) not in (select passable.queue, passable.ordering_key from passable)

-- define: suspect
runs.losses > 0 and runs.run_at <= (select clock_timestamp()) and (runs.ordering_key || '') is null
       and runs.state = 'queued' and runs.queue || '' = any(%(queues)s::text[]) and runs.task = any(%(tasks)s::text[])
       and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))
       and not exists (select from queue_service.queues where queues.name = runs.queue and ({paused} or {full}))

-- define: within_limits
counted as materialized (
    select queues.name, queues.claims, given.wanted, {vacant} as vacant
      from given join queue_service.queues on queues.name = given.queue
     where {limited} and ({paused}) is not true
), asked as materialized (
    select held.name as queue, held.width, held.tokens, held.rate, held.period,
           greatest(0, least(held.wanted, held.vacant, floor(held.tokens)))::integer as wanted
      from (
        select queues.name, coalesce(queues.max_running_per_key, 1) as width, queues.rate, queues.period,
               {tokens} as tokens, counted.wanted, counted.vacant
          from counted join queue_service.queues on queues.name = counted.name and queues.claims = counted.claims
           for update of queues skip locked
      ) as held
)

-- define: counted_in
took as materialized (
    select picked.queue, count(*) as runs from picked group by picked.queue
), spent as (
    update queue_service.queues
       set claims = claims + 1, tokens = {tokens} - took.runs,
           tokens_at = case when queues.rate is not null then clock_timestamp() end
      from took
     where queues.name = took.queue and {limited}
)

-- define: new_lease
lease as (
    insert into queue_service.leases (worker_id, expires_at, run_ids, limited, final_tasks)
    select %(worker_id)s, clock_timestamp() + %(lease)s::interval, array_agg(picked.id), %(limited)s::boolean,
           %(final_tasks)s::text[]
      from picked having count(*) > 0
    returning id
)

-- define: take_picked
update queue_service.runs
   set state = 'running', attempt = runs.attempt + 1, claimed_at = clock_timestamp(), lease_id = lease.id
  from lease
 where runs.id = any(array(select picked.id from picked)) and runs.state = 'queued'
returning runs.id, runs.queue, runs.task, runs.payload::text, runs.attempt, runs.failures, runs.losses, runs.priority,
          runs.created_at, runs.run_at, runs.expires_at, runs.max_attempts, runs.retry_delay, runs.timeout,
          runs.singleton_key, runs.ordering_key, runs.organization_id, runs.metadata::text, runs.lease_id

-- define: told_by_queue
select taken.*, asked.queue,
       case when asked.tokens - coalesce((select took.runs from took where took.queue = asked.queue), 0) < 1
            then extract(epoch from asked.period)::float8 / asked.rate
                 * (1 - asked.tokens + coalesce((select took.runs from took where took.queue = asked.queue), 0)) end
  from asked left join taken on taken.queue = asked.queue

-- define: full
(coalesce({vacant} < 1, false) or coalesce({tokens} < 1, false))

-- define: vacant
case when queues.max_running is not null then queues.max_running - (
                    select count(*) from queue_service.runs
                     where runs.id = any(array(
                            select unnest(leases.run_ids) from queue_service.leases where leases.limited))
                       and runs.queue = queues.name and runs.state = 'running') end

-- define: tokens
least(queues.burst, queues.tokens + extract(epoch from clock_timestamp() - queues.tokens_at)::float8
                                             * queues.rate / extract(epoch from queues.period)::float8)

-- define: limited
(queues.max_running is not null or queues.rate is not null)

-- define: paused
queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > (select clock_timestamp())

-- define: for_us
(runs.reserved_for is null or runs.reserved_for = %(owner)s::text
                or runs.run_at < (select clock_timestamp()) - interval '1 second')

-- define: in_lane
runs.state = 'queued' and coalesce(runs.expires_at, 'infinity') > (select clock_timestamp())
           and (runs.attempt > 0 or runs.run_at <= (select clock_timestamp()))

-- name: enqueue
-- Store a run, and tell of it if there is a notice to send. One row: its id. None: a live run holds the singleton key,
-- and nothing changed.
-- writes: runs
with stored as (
    insert into queue_service.runs {enqueue_values}
        on conflict (queue, singleton_key) where singleton_key is not null do nothing
    returning id
)
select id, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end from stored

-- name: enqueue_all
-- Store runs of several callers, none of which has a singleton key: then nothing is waited for. `runs` is a JSON array of
-- objects. Rows: their ids, in the order of the array. They are stored by lane, so that two such statements lock the lanes
-- they share in one order, and cannot deadlock.
-- writes: runs
with asked as materialized (
    select nextval('queue_service.runs_id_seq') as id, asked.*,
           coalesce(asked.run_at, clock_timestamp() + coalesce(asked.delay, interval '0')) as due
      from rows from (
        jsonb_to_recordset(%(runs)s::jsonb)
            as (queue text, task text, payload jsonb, priority smallint, delay interval, run_at timestamptz,
                expires_in interval, ordering_key text, max_attempts integer, retry_delay interval, timeout interval,
                metadata jsonb, organization_id text)
      ) with ordinality as asked (queue, task, payload, priority, delay, run_at, expires_in, ordering_key, max_attempts,
                                  retry_delay, timeout, metadata, organization_id, place)
), stored as (
    insert into queue_service.runs (id, queue, task, payload, priority, run_at, expires_at, ordering_key, max_attempts,
                                    retry_delay, timeout, metadata, organization_id)
    select id, queue, task, payload, priority, due, due + expires_in, ordering_key, max_attempts, retry_delay, timeout,
           metadata, organization_id
      from asked
     order by queue, ordering_key, id
)
select id from asked order by place

-- name: replace
-- Store a run, or put it in the place of the queued one that holds its singleton key, whose id it keeps.
-- None: the holder is running, and nothing changed.
-- writes: runs
with stored as (
    insert into queue_service.runs {enqueue_values}
        on conflict (queue, singleton_key) where singleton_key is not null do update
       set task = excluded.task, payload = excluded.payload, priority = excluded.priority, run_at = excluded.run_at,
           expires_at = excluded.expires_at, ordering_key = excluded.ordering_key,
           max_attempts = excluded.max_attempts, retry_delay = excluded.retry_delay, timeout = excluded.timeout,
           metadata = excluded.metadata, organization_id = excluded.organization_id, failures = 0, error = null,
           attempts = null
     where runs.state = 'queued'
    returning id
)
select id, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end from stored

-- name: singleton_holder
-- The live run that holds a singleton key, if there is one.
select id from queue_service.runs where queue = %(queue)s and singleton_key = %(singleton_key)s

-- name: reserve
-- Ids for runs about to be copied in, ascending, with the time they are due and the time they expire.
select due.run_at, due.run_at + %(expires_in)s::interval,
       array(select nextval('queue_service.runs_id_seq') from generate_series(1, %(count)s))
  from (select coalesce(%(run_at)s::timestamptz,
                        clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due

-- name: scan
-- For each priority of each queue where something is due: the first run that a claim could take, which is where claims
-- may start to look. Paused queues are left out. Distinct priorities are found by hopping along the index, one descent
-- each. A row without a priority says that a lane of the queue is to be looked at. The first column is the time of the scan;
-- it comes even where nothing is due. The last says whether the queue has a limit.
with recursive asked (queue) as materialized (
    select each.queue from unnest(%(queues)s::text[]) as each (queue)
     where not exists (select from queue_service.queues where queues.name = each.queue and {paused})
), level (queue, priority) as (
    select asked.queue, top.priority
      from asked
     cross join lateral (
        select runs.priority from queue_service.runs
         where runs.queue = asked.queue and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1
     ) as top
    union all
    select level.queue, below.priority
      from level
     cross join lateral (
        select runs.priority from queue_service.runs
         where runs.queue = level.queue and runs.priority < level.priority and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1
     ) as below
)
select moment.now, due.queue, due.priority, due.run_at, due.id,
       exists (select from queue_service.queues where queues.name = due.queue and {limited})
  from (select clock_timestamp() as now) as moment
  left join (
    select level.queue, level.priority, first.run_at, first.id
      from level
     cross join lateral (
        select runs.run_at, runs.id from queue_service.runs
         where runs.queue = level.queue and runs.priority = level.priority and runs.ordering_key is null
           and runs.run_at <= (select clock_timestamp())
           and runs.state = 'queued' and runs.losses = 0 and runs.task = any(%(tasks)s::text[])
           and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))
           and {for_us}
         order by runs.run_at, runs.id + 0 limit 1
     ) as first
    union all
    select asked.queue, null, null, null
      from asked
     cross join lateral (
        select true from queue_service.lanes
         where lanes.queue = asked.queue and lanes.running < lanes.width and lanes.next_at <= (select clock_timestamp())
         order by lanes.queue, lanes.next_at limit 1
     ) as lane
  ) as due on true

-- name: claim
-- Take due runs of some queues, from each at most as many as are `wanted`, higher priority first, each priority from its
-- floor on. Passed over: runs of tasks not named, expired ones, suspects (see claim_suspect), those reserved for another
-- owner, and what another session is claiming. A queue that is paused or has a limit gives none. The clock is read in a
-- subquery, since a volatile function cannot bound an index scan.
-- writes: runs, leases
with asked as materialized (
    select asked.queue, asked.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as asked (queue, wanted)
     where asked.queue not in (select queues.name from queue_service.queues where {paused} or {limited})
), picked as materialized (
    select chosen.id from asked cross join lateral (
        {from_floors}
     ) as chosen
), {new_lease}
{take_picked}

-- name: claim_lanes
-- Take the heads of lanes that are free, from each queue at most as many as are `wanted`, and from each lane one. A lane whose
-- head is not due yet is looked at again when it is, and one whose head is for another worker in a second: it must not stand
-- before the others. A head that somebody holds (to cancel it, say) is left alone, and so is its lane.
-- writes: runs, leases, lanes
with asked as materialized (
    select asked.queue, asked.wanted, coalesce((select queues.max_running_per_key from queue_service.queues
                                                 where queues.name = asked.queue), 1) as width
      from unnest(%(queues)s::text[], %(wanted)s::integer[]) as asked (queue, wanted)
     where asked.queue not in (select queues.name from queue_service.queues where {paused} or {limited})
), {from_lanes}, {new_lease}
{take_picked}

-- name: claim_limited
-- As `claim`, of queues that have a limit, and within it. Rows: for each queue that is not being claimed from by another
-- session, in how many seconds more may begin (null: it is not the rate that forbids it), with each run that was taken.
-- writes: runs, leases, queues
with given as materialized (
    select given.queue, given.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as given (queue, wanted)
), {within_limits}, picked as materialized (
    select chosen.id, chosen.queue from asked cross join lateral (
        {from_floors}
     ) as chosen
), {counted_in}, {new_lease}, taken as (
{take_picked}
)
{told_by_queue}

-- name: claim_limited_lanes
-- As `claim_lanes`, of queues that have a limit, and within it. Rows as of `claim_limited`.
-- writes: runs, leases, lanes, queues
with given as materialized (
    select given.queue, given.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as given (queue, wanted)
), {within_limits}, {from_lanes}, {counted_in}, {new_lease}, taken as (
{take_picked}
)
{told_by_queue}

-- name: claim_suspect
-- Take one due run that lost a worker before. It comes alone, so that a run that kills its worker kills nothing else; one of
-- a lane keeps its place there instead.
-- The `|| ''` keep the planner from the claim index, where it would read whole queues to find the few suspects.
-- writes: runs, leases, queues
with suspect as materialized (
    select runs.id, runs.queue from queue_service.runs where {suspect}
     order by runs.run_at
     limit 1
       for update of runs skip locked
), given as materialized (
    select suspect.queue, 1 as wanted from suspect
), {within_limits}, picked as materialized (
    select suspect.id, suspect.queue from suspect
     where suspect.queue in (select asked.queue from asked where asked.wanted > 0)
        or not exists (select from queue_service.queues where queues.name = suspect.queue and {limited})
), {counted_in}, {new_lease}
{take_picked}

-- name: suspect_is_due
-- Whether claim_suspect would find one.
select exists (select from queue_service.runs where {suspect})

-- name: extend
-- Push the deadline of leases. One row for each that is still held; the others were swept, and their runs with them.
-- writes: leases
update queue_service.leases
   set expires_at = clock_timestamp() + %(lease)s::interval
 where id = any(%(leases)s::bigint[])
returning id

-- name: cancel_requests
-- The runs under these leases that someone asked to cancel.
select id from queue_service.runs
 where id = any(array(select unnest(run_ids) from queue_service.leases where id = any(%(leases)s::bigint[])))
   and lease_id = any(%(leases)s::bigint[]) and cancel_requested

-- name: plan_as_ours
-- In a session that is not ours: for the rest of its transaction, what our statements need of the planner.
select set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_mergejoin', 'off', true)

-- name: hold
-- Keep everyone else from a run until the caller's transaction ends. Row: its id, if the claim is still held.
select id from queue_service.runs
 where id = %(run_id)s and attempt = %(attempt)s and state = 'running'
   for update

-- name: report
-- Store how far claimed runs are: of each an object of value and note. Rows: the claims of which it was stored. A run that
-- another session has locked, as its handler's own transaction may for long, is passed over: no other waits for it here.
-- writes: runs
with unlocked as materialized (
    select runs.id from queue_service.runs
     where {held}
     order by runs.id
       for update skip locked
)
update queue_service.runs
   set progress = ((select %(reports)s::jsonb) -> (width_bucket(runs.id, %(ids)s::bigint[]) - 1))
                  || jsonb_build_object('at', clock_timestamp())
 where runs.id = any(array(select unlocked.id from unlocked))
returning runs.id, runs.attempt

-- name: finish
-- End claimed runs: out of `runs`, into history, and let go of leases that hold nothing more. One row for each claim
-- that was still held; a claim that is missing was lost, and nothing about its run changed.
-- `ids` ascend, so width_bucket finds the place of a run's attempt and outcome by bisection. An outcome is an object of
-- state, result and error, or null for plain success. The leases are freed first (their count makes it so): a sweep
-- locks in that order, and the two would deadlock.
-- writes: runs, finished_runs, leases
with freed as (
    delete from queue_service.leases where id = any(%(leases)s::bigint[]) returning id
), gone as (
    delete from queue_service.runs
     where {held_claim}
    returning runs.*, {outcome} as outcome
)
insert into queue_service.finished_runs ({history_columns})
select id, run_at, created_at, expires_at, claimed_at, %(worker_id)s, attempt,
       failures + (outcome ->> 'state' is not distinct from 'failed')::integer, losses, max_attempts, priority,
       coalesce(outcome ->> 'state', 'succeeded'), queue, task, payload, singleton_key, ordering_key, organization_id,
       retry_delay, timeout, metadata, outcome -> 'result', coalesce(outcome -> 'error', error), attempts
  from gone
returning id, attempt

-- name: busy
-- Of these claims, those that are held, but whose run or lane another session has locked: their endings would wait for it.
-- Rows: the claims.
with mine as materialized (
    select runs.id, runs.attempt, runs.queue, runs.ordering_key from queue_service.runs where {held}
), {unlocked}
select mine.id, mine.attempt from mine where {locked}

-- name: give_back
-- Return claimed runs to their queue: after a delay, or to their old place where there is none. One asked to be
-- cancelled meanwhile ends so instead. One row for each claim that was still held. An outcome is an object of delay (in
-- seconds), failed, error and reserved_for; without the last, the run is anyone's. The runs are locked before
-- cancel_requested is looked at: a request that came in between would otherwise fit neither branch. The owner of a
-- reserved run is told with the commit: it has a second, and a poll may come later (counting `told` makes it happen).
-- writes: runs, finished_runs, leases
with freed as (
    delete from queue_service.leases where id = any(%(leases)s::bigint[]) returning id
), held as materialized (
    select runs.id, runs.cancel_requested from queue_service.runs
     where {held_claim}
     order by runs.id
       for update
), gone as (
    delete from queue_service.runs
     where runs.id = any(array(select held.id from held where held.cancel_requested))
    returning runs.*, {outcome} as outcome
), cancelled as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at, %(worker_id)s, attempt,
           failures + coalesce((outcome ->> 'failed')::boolean, false)::integer, losses, max_attempts, priority,
           'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout,
           metadata, null, coalesce(outcome -> 'error', jsonb_build_object('reason', 'cancelled', 'message',
               'It was cancelled while it ran.')), attempts
      from gone
    returning id, attempt
), queued as (
    update queue_service.runs
       set state = 'queued', lease_id = null, claimed_at = null,
           failures = failures + coalesce(({outcome} ->> 'failed')::boolean, false)::integer,
           run_at = coalesce(clock_timestamp() + make_interval(secs => ({outcome} ->> 'delay')::float8), run_at),
           error = coalesce({outcome} -> 'error', error), reserved_for = {outcome} ->> 'reserved_for', progress = null,
           attempts = case when ({outcome} -> 'failed')::boolean then (
               select {attempts_and_this}
                 from (select %(worker_id)s::bigint as worker_id, clock_timestamp() as ended_at,
                              {outcome} -> 'error' as error) as this) else attempts end
     where runs.id = any(array(select held.id from held where not held.cancel_requested))
    returning id, attempt, queue, priority, reserved_for
), told as (
    select pg_notify('queue_service_runs', priority || ' ' || queue)::text from queued where reserved_for is not null
)
select id, attempt from queued where (select count(*) from told) >= 0
union all
select id, attempt from cancelled

-- name: sweep
-- Take the leases that have lapsed, at most `limit` of them, `excluding` these, and with them the runs they held. Each goes back to its
-- place in the queue with one loss more, or ends: `cancelled` if that was asked, `failed` at `max_losses`, and at the first
-- loss if its task is among those that the lease says are not to be begun twice.
-- Rows: run id, its state now, its queue and priority. The guard stands in the DELETE: an extend that commits first wins.
-- writes: leases, runs, finished_runs
with lapsed as materialized (
    delete from queue_service.leases
     where id = any(array(select id from queue_service.leases
                           where expires_at < (select clock_timestamp()) and id <> all(%(excluding)s::bigint[])
                           order by expires_at limit %(limit)s for update skip locked))
       and expires_at < clock_timestamp()
    returning id, worker_id, run_ids, final_tasks
), lost as materialized (
    select id, cancel_requested or losses + 1 >= %(max_losses)s or {is_final} as is_over from queue_service.runs
     where id = any(array(select unnest(lapsed.run_ids) from lapsed))
       and lease_id = any(array(select lapsed.id from lapsed)) and state = 'running'
     order by id
       for update
), gone as (
    delete from queue_service.runs
     where id = any(array(select lost.id from lost where lost.is_over))
    returning runs.*
), ended as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at,
           (select lapsed.worker_id from lapsed where lapsed.id = gone.lease_id), attempt, failures, losses + 1,
           max_attempts, priority, case when cancel_requested then 'cancelled' else 'failed' end, queue, task, payload,
           singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata, null,
           jsonb_build_object('reason', 'worker_lost', 'message',
               format('The worker was lost while this run was with it, for the %%s. time.', losses + 1)
               || case when {is_final} then ' Its task says on_lost="fail": it is begun again only if you retry it.'
                       else '' end), attempts
      from gone
    returning id, state, queue, priority
), queued as (
    update queue_service.runs
       set state = 'queued', lease_id = null, claimed_at = null, losses = losses + 1, error = {lost}, progress = null,
           attempts = (select {attempts_and_this}
                         from (select lapsed.worker_id, clock_timestamp() as ended_at, {lost} as error
                                 from lapsed where lapsed.id = runs.lease_id) as this)
     where id = any(array(select lost.id from lost where not lost.is_over))
    returning id, state, queue, priority
)
select id, state, queue, priority from queued union all select id, state, queue, priority from ended

-- name: busy_leases
-- Of the leases that have lapsed, at most `limit` of them, those that hold a run which another session has locked, or the
-- lane of which it has: a sweep would wait for it. Rows: lease ids.
with lapsed as materialized (
    select id, run_ids from queue_service.leases
     where expires_at < (select clock_timestamp())
     order by expires_at limit %(limit)s
), mine as materialized (
    select runs.id, runs.lease_id, runs.queue, runs.ordering_key from queue_service.runs
     where runs.id = any(array(select unnest(lapsed.run_ids) from lapsed))
       and runs.lease_id = any(array(select lapsed.id from lapsed)) and runs.state = 'running'
), {unlocked}
select distinct mine.lease_id from mine where {locked}

-- name: expire
-- End queued runs whose time to start has passed, at most `limit` of them; those of a lane that another session has locked
-- are left for later. Rows: run ids. The guard is spelt with coalesce, or the index on expires_at could serve the outer look
-- by id, and would be walked from end to end.
-- writes: runs, finished_runs
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
), gone as (
    delete from queue_service.runs
     where id = any(array(select passable.id from passable))
       and state = 'queued' and coalesce(expires_at, 'infinity') < clock_timestamp()
    returning id, run_at, created_at, expires_at, claimed_at, null::bigint, attempt, failures, losses, max_attempts,
              priority, 'expired', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay,
              timeout, metadata, null::jsonb,
              coalesce(error, jsonb_build_object('reason', 'expired', 'message', 'It was not started in time.')), attempts
)
insert into queue_service.finished_runs ({history_columns})
select * from gone
returning id

-- name: cancel
-- A queued run ends `cancelled`; a running one is marked, and its worker told. Row: 'cancelled' or 'requested'; none if
-- no live run has this id. The row is locked before its state is looked at, so that a claim cannot slip between.
-- writes: runs, finished_runs
with target as materialized (
    select state from queue_service.runs where id = %(run_id)s for update
), gone as (
    delete from queue_service.runs
     where id = %(run_id)s and (select target.state from target) = 'queued'
    returning runs.*
), ended as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at, null, attempt, failures, losses, max_attempts, priority,
           'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout,
           metadata, null,
           coalesce(error, jsonb_build_object('reason', 'cancelled', 'message', 'It was cancelled before it started.')),
           attempts
      from gone
    returning id
), asked as (
    update queue_service.runs set cancel_requested = true
     where id = %(run_id)s and (select target.state from target) = 'running'
    returning id
)
select 'cancelled' from ended union all select 'requested' from asked

-- name: retry
-- Move a run that failed, was cancelled or expired back to its queue, due now, its counters fresh. The attempt goes on
-- counting, so that no old claim fits it; the last one, which its own columns told of, joins those kept with the run.
-- Row: queue and priority; none if there is no such run in history.
-- A live run with the same singleton key makes this a unique violation, and then nothing moved.
-- writes: runs, finished_runs
with taken as (
    delete from queue_service.finished_runs
     where id = %(run_id)s and state in ('failed', 'cancelled', 'expired')
    returning *
)
{queued_again}
returning queue, priority

-- name: retry_many
-- As `retry`, the runs of history that ended in a state that is not success, of a queue, a task and a time: the oldest first,
-- at most `limit` of the next `scan_limit`, for what is chosen may be rare among what there is. One whose singleton key a live run
-- holds stays where it is, and so does one that somebody else is moving. Row: the time up to which runs are chosen, where to
-- go on (null: nowhere), how many were found, how many of those moved, and the notices. Of the partitions only those are read
-- in which something can have ended since the time asked for; that is why the stretch compares the day.
-- Their rows are locked first, and go once they are stored: a delete that feeds the insert would lose what conflicts. It
-- reads the partitions between the times of what was found, and does not say the state once more: before Postgres 18 the
-- walk's own index would serve it, and be read from end to end.
-- writes: runs, finished_runs
with {moment}, {stretch}, taken as materialized (
    select * from {chosen}
     order by id limit %(limit)s
       for update skip locked
), stored as (
    {queued_again}
     order by id
        on conflict (queue, singleton_key) where singleton_key is not null do nothing
    returning id, queue, priority
), gone as (
    delete from queue_service.finished_runs
     where id = any(array(select stored.id from stored))
       and finished_at >= (select min(taken.finished_at) from taken)
       and finished_at <= (select max(taken.finished_at) from taken)
    returning id
)
select moment.until,
       case when (select count(*) from taken) < %(limit)s then stretch.last else (select max(taken.id) from taken) end,
       (select count(*) from taken), (select count(*) from gone),
       array(select distinct stored.priority || ' ' || stored.queue from stored)
  from moment, stretch

-- name: count_many
-- How many `retry_many` would find, at most `limit`. Row: as there, without the last two.
with {moment}, {stretch}
select moment.until, stretch.last,
       (select count(*) from (select from {chosen} limit %(limit)s) as fitting)
  from moment, stretch

-- name: delete
-- Forget a run that is queued or finished. Row: its id; none if it is running or unknown.
-- writes: runs, finished_runs
with live as (
    delete from queue_service.runs where id = %(run_id)s and state = 'queued' returning id
), finished as (
    delete from queue_service.finished_runs where id = %(run_id)s returning id
)
select id from live union all select id from finished

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
  from unnest(%(run_ids)s::bigint[]) as asked (id)
  left join lateral (
    select true as found from queue_service.runs where runs.id = asked.id limit 1
  ) as live on true
  left join lateral (
    select finished_runs.state from queue_service.finished_runs where finished_runs.id = asked.id limit 1
  ) as ending on true
 where live.found is null

-- name: page
-- Runs by descending id, below `before`: one page of a listing, from the places that are named. Of these no more than
-- `scan_limit` runs are looked at, however few of them fit. Rows: those that fit, and the last one that was looked at if there may
-- be more below it; the last two columns say so. Each place is an ordered walk with a limit of its own, or the planner would
-- sort all of history. Those that are running are found by their leases: there may be a million queued ones.
select {read_columns}, is_fitting, place = %(scan_limit)s from (
    select looked.*, row_number() over (order by id desc) as place,
           (%(state)s::text is null or state = %(state)s) and (%(queue)s::text is null or queue = %(queue)s)
               and (%(task)s::text is null or task = %(task)s) as is_fitting
      from (
        ({live_as_read} where %(live)s::boolean and id < %(before)s order by id desc limit %(scan_limit)s)
        union all
        ({live_as_read} where %(running)s::boolean and id < %(before)s
            and id = any(array(select unnest(run_ids) from queue_service.leases)) order by id desc limit %(scan_limit)s)
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

-- name: purge
-- Forget queued runs of a queue, at most `limit` of them. Row: how many went.
-- writes: runs
with gone as (
    delete from queue_service.runs
     where id = any(array(select id from queue_service.runs
                           where queue = %(queue)s and state = 'queued' and ordering_key is null
                           order by queue, priority desc, run_at, id + 0 limit %(limit)s for update skip locked)
                    || array(select id from queue_service.runs
                              where queue = %(queue)s and state = 'queued' and ordering_key is not null
                              order by queue, ordering_key, id limit %(limit)s for update skip locked))
       and state = 'queued'
    returning id
)
select count(*) from gone

-- name: tally
-- What there is of a queue, each count stopping at `most`: queued and due, queued for later, running; the oldest due.
select (select count(*) from (({of_queue} and ordering_key is null and run_at <= clock_timestamp() limit %(most)s)
                              union all
                              ({of_queue} and ordering_key is not null and run_at <= clock_timestamp() limit %(most)s)
                              limit %(most)s) as due),
       (select count(*) from (({of_queue} and ordering_key is null and run_at > clock_timestamp() limit %(most)s)
                              union all
                              ({of_queue} and ordering_key is not null and run_at > clock_timestamp() limit %(most)s)
                              limit %(most)s) as later),
       (select count(*) from queue_service.runs
         where id = any(array(select unnest(run_ids) from queue_service.leases)) and queue = %(queue)s
           and state = 'running'),
       least((select min(run_at) from (select run_at from queue_service.runs where queue = %(queue)s and state = 'queued'
                                          and run_at <= clock_timestamp() and ordering_key is null
                                        order by queue, priority desc, run_at, id + 0 limit 1) as first),
             (select next_at from queue_service.lanes
               where queue = %(queue)s and running < width and next_at <= clock_timestamp()
               order by queue, next_at limit 1))
