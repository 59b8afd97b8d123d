-- Taking runs that are due: a scan finds where claims begin, a claim takes what is free from there on.
--
-- The planner's picture of `runs` is always out of date (vacuum may find it empty a moment before a million rows
-- come), and with zero rows expected it will read the whole table as the outer side of a join. So `runs` is never
-- joined: it is reached by `id = any(array)` or by an ordered walk along the claim index with a limit, and nothing
-- else. That index holds `id + 0`, so that the first can never be served by the second. The clock is read in a
-- subquery: a volatile function cannot bound an index scan.
--
-- Runs with an ordering key are in no claim index: they stand in the lane of their queue and key, and `lanes` has a
-- row for each, kept by a trigger. A lane is claimed from while no run of it is running; what is taken is its head,
-- the oldest run that may run. Not yet in the lane is what was enqueued for later and never begun, no longer in it
-- what has expired; a head that was begun and waits for its next attempt keeps its place, and the lane waits with it.
-- Locks: a lane before its queued runs, a running run before its lane.
--
-- A queue may have a limit: how many of its runs go on at once, or how many may begin in a time. Such a queue is
-- passed over by the claims of the others, which then pay nothing for it, and has claims of its own. What runs is
-- counted from the leases that those claims marked, so that no counter can drift. The count comes from the snapshot,
-- but nothing can have made it greater since: each such claim changes `claims` of the queue's row, and one whose
-- snapshot shows another number than the row it then locks takes nothing.
--
-- A run that is `reserved_for` an owner is for a second, from its run_at on, that owner's to claim. After that it is
-- anyone's, so that an owner who died delays it and no more.

-- define: is_paused
-- Of a row of `queues`, as the three after it.
queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > (select clock_timestamp())

-- define: is_limited
(queues.max_running is not null or queues.rate is not null)

-- define: tokens
-- How many more may begin by the rate, a token each; null where there is none.
least(queues.burst, queues.tokens + extract(epoch from clock_timestamp() - queues.tokens_at)::float8
                                             * queues.rate / extract(epoch from queues.period)::float8)

-- define: vacant
-- How many more may run; null where no limit says so.
case when queues.max_running is not null then queues.max_running - (
                    select count(*) from queue_service.runs
                     where runs.id = any(array(
                            select unnest(leases.run_ids) from queue_service.leases where leases.limited))
                       and runs.queue = queues.name and runs.state = 'running') end

-- define: is_for_us
(runs.reserved_for is null or runs.reserved_for = %(owner)s::text
                or runs.run_at < (select clock_timestamp()) - interval '1 second')

-- define: is_claimable
runs.run_at <= (select clock_timestamp()) and runs.state = 'queued' and runs.losses = 0
               and runs.task = any(%(tasks)s::text[])
               and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))

-- name: scan
-- For each priority of each queue where something is due: the first run that a claim could take, which is where claims
-- may start to look. Paused queues are left out. Distinct priorities are found by hopping along the index, one descent
-- each. A row without a priority says that a lane of the queue is to be looked at. The first column is the time of the scan;
-- it comes even where nothing is due. The last two say whether the queue has a limit, and how many seconds the look has
-- taken so far: what it waited for before it began, as a lock on the table, is not in it.
with recursive asked (queue) as materialized (
    select each.queue from unnest(%(queues)s::text[]) as each (queue)
     where not exists (select from queue_service.queues where queues.name = each.queue and {is_paused})
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
       exists (select from queue_service.queues where queues.name = due.queue and {is_limited}),
       extract(epoch from clock_timestamp() - moment.now)::float8
  from (select clock_timestamp() as now) as moment
  left join (
    select level.queue, level.priority, first.run_at, first.id
      from level
     cross join lateral (
        select runs.run_at, runs.id from queue_service.runs
         where runs.queue = level.queue and runs.priority = level.priority and runs.ordering_key is null
           and {is_claimable} and {is_for_us}
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

-- define: new_lease
-- One for all that was picked; none where nothing was.
insert into queue_service.leases (worker_id, expires_at, run_ids, limited, final_tasks)
    select %(worker_id)s, clock_timestamp() + %(lease)s::interval, array_agg(picked.id), %(limited)s::boolean,
           %(final_tasks)s::text[]
      from picked having count(*) > 0
    returning id

-- define: take_picked
-- Takes what was picked. That is locked, and so still queued; the guard stands where it is written all the same. A run whose
-- attempts have come to the end of the integers comes without its payload: no claim on it differs from the one before.
update queue_service.runs
   set state = 'running', attempt = runs.attempt + (runs.attempt < 2147483647)::integer, claimed_at = clock_timestamp(), lease_id = lease.id
  from lease
 where runs.id = any(array(select picked.id from picked)) and runs.state = 'queued'
returning runs.id, runs.queue, runs.task, case when runs.attempt < 2147483647 then runs.payload::text end, runs.attempt, runs.failures, runs.losses, runs.priority,
          runs.created_at, runs.run_at, runs.expires_at, runs.max_attempts, runs.retry_delay, runs.timeout,
          runs.singleton_key, runs.ordering_key, runs.organization_id, runs.metadata::text, runs.lease_id

-- name: claim
-- Take due runs of some queues, from each at most as many as are `wanted`, higher priority first, each priority from its
-- floor on. Passed over: runs of tasks not named, expired ones, suspects (see claim_suspect), those reserved for another
-- owner, and what another session is claiming. A queue that is paused or has a limit gives none.
-- writes: runs, leases
with asked as materialized (
    select asked.queue, asked.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as asked (queue, wanted)
     where asked.queue not in (select queues.name from queue_service.queues where {is_paused} or {is_limited})
), picked as materialized (
    select chosen.id
      from asked
     cross join lateral (
        select candidate.id, floor.queue
          from unnest(%(floor_queues)s::text[], %(priorities)s::smallint[], %(floors)s::timestamptz[],
                      %(floor_ids)s::bigint[]) as floor (queue, priority, run_at, id)
         cross join lateral (
            select runs.id from queue_service.runs
             where runs.queue = floor.queue and runs.priority = floor.priority and runs.ordering_key is null
               and (runs.run_at, runs.id + 0) >= (floor.run_at, floor.id)
               and {is_claimable} and {is_for_us}
             order by runs.run_at, runs.id + 0
             limit asked.wanted
               for update skip locked
         ) as candidate
         where floor.queue = asked.queue
         limit asked.wanted
     ) as chosen
), lease as (
    {new_lease}
)
{take_picked}

-- define: from_lanes
-- Makes `picked`, the heads of free lanes of the queues `asked` for, and puts off the lanes that gave none.
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
        select runs.id, runs.run_at, runs.task = any(%(tasks)s::text[]) and {is_for_us} as is_ours
          from queue_service.runs
         where runs.queue = free.queue and runs.ordering_key = free.ordering_key
           and runs.state = 'queued' and coalesce(runs.expires_at, 'infinity') > (select clock_timestamp())
           and (runs.attempt > 0 or runs.run_at <= (select clock_timestamp()))
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

-- name: claim_lanes
-- Take the heads of lanes that are free, from each queue at most as many as are `wanted`, and from each lane one. A lane
-- whose head is not due yet is looked at again when it is, and one whose head is for another worker in a second: it must
-- not stand before the others. A head that somebody holds (to cancel it, say) is left alone, and so is its lane.
-- writes: runs, leases, lanes
with asked as materialized (
    select asked.queue, asked.wanted, coalesce((select queues.max_running_per_key from queue_service.queues
                                                 where queues.name = asked.queue), 1) as width
      from unnest(%(queues)s::text[], %(wanted)s::integer[]) as asked (queue, wanted)
     where asked.queue not in (select queues.name from queue_service.queues where {is_paused} or {is_limited})
), {from_lanes}, lease as (
    {new_lease}
)
{take_picked}

-- define: within_limits
-- Makes `asked` of `given`: the queues that are not being claimed from by another session, and how many may begin of each.
counted as materialized (
    select queues.name, queues.claims, given.wanted, {vacant} as vacant
      from given join queue_service.queues on queues.name = given.queue
     where {is_limited} and ({is_paused}) is not true
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
-- Makes `took`, how many of each queue were picked, and takes as many tokens.
took as materialized (
    select picked.queue, count(*) as runs from picked group by picked.queue
), spent as (
    update queue_service.queues
       set claims = claims + 1, tokens = {tokens} - took.runs,
           tokens_at = case when queues.rate is not null then clock_timestamp() end
      from took
     where queues.name = took.queue and {is_limited}
)

-- name: claim_limited
-- As `claim`, of queues that have a limit, and within it. Rows: for each queue that is not being claimed from by another
-- session, in how many seconds more may begin (null: it is not the rate that forbids it), with each run that was taken.
-- writes: runs, leases, queues
with given as materialized (
    select given.queue, given.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as given (queue, wanted)
), {within_limits}, picked as materialized (
    select chosen.id, chosen.queue
      from asked
     cross join lateral (
        select candidate.id, floor.queue
          from unnest(%(floor_queues)s::text[], %(priorities)s::smallint[], %(floors)s::timestamptz[],
                      %(floor_ids)s::bigint[]) as floor (queue, priority, run_at, id)
         cross join lateral (
            select runs.id from queue_service.runs
             where runs.queue = floor.queue and runs.priority = floor.priority and runs.ordering_key is null
               and (runs.run_at, runs.id + 0) >= (floor.run_at, floor.id)
               and {is_claimable} and {is_for_us}
             order by runs.run_at, runs.id + 0
             limit asked.wanted
               for update skip locked
         ) as candidate
         where floor.queue = asked.queue
         limit asked.wanted
     ) as chosen
), {counted_in}, lease as (
    {new_lease}
), taken as (
    {take_picked}
)
select taken.*, asked.queue,
       case when asked.tokens - coalesce((select took.runs from took where took.queue = asked.queue), 0) < 1
            then extract(epoch from asked.period)::float8 / asked.rate
                 * (1 - asked.tokens + coalesce((select took.runs from took where took.queue = asked.queue), 0)) end
  from asked left join taken on taken.queue = asked.queue

-- name: claim_limited_lanes
-- As `claim_lanes`, of queues that have a limit, and within it. Rows as of `claim_limited`.
-- writes: runs, leases, lanes, queues
with given as materialized (
    select given.queue, given.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as given (queue, wanted)
), {within_limits}, {from_lanes}, {counted_in}, lease as (
    {new_lease}
), taken as (
    {take_picked}
)
select taken.*, asked.queue,
       case when asked.tokens - coalesce((select took.runs from took where took.queue = asked.queue), 0) < 1
            then extract(epoch from asked.period)::float8 / asked.rate
                 * (1 - asked.tokens + coalesce((select took.runs from took where took.queue = asked.queue), 0)) end
  from asked left join taken on taken.queue = asked.queue

-- name: claim_suspect
-- Take one due run that lost a worker before. It comes alone, so that a run that kills its worker kills nothing else; one of
-- a lane keeps its place there instead.
-- The `|| ''` keep the planner from the claim index, where it would read whole queues to find the few suspects.
-- writes: runs, leases, queues
with suspect as materialized (
    select runs.id, runs.queue from queue_service.runs
     where runs.losses > 0 and runs.run_at <= (select clock_timestamp()) and (runs.ordering_key || '') is null
       and runs.state = 'queued' and runs.queue || '' = any(%(queues)s::text[]) and runs.task = any(%(tasks)s::text[])
       and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))
       and not exists (
            select from queue_service.queues
             where queues.name = runs.queue
               and ({is_paused} or coalesce({vacant} < 1, false) or coalesce({tokens} < 1, false)))
     order by runs.run_at
     limit 1
       for update of runs skip locked
), given as materialized (
    select suspect.queue, 1 as wanted from suspect
), {within_limits}, picked as materialized (
    select suspect.id, suspect.queue from suspect
     where suspect.queue in (select asked.queue from asked where asked.wanted > 0)
        or not exists (select from queue_service.queues where queues.name = suspect.queue and {is_limited})
), {counted_in}, lease as (
    {new_lease}
)
{take_picked}

-- name: suspect_is_due
-- Whether claim_suspect would find one.
select exists (
    select from queue_service.runs
     where runs.losses > 0 and runs.run_at <= (select clock_timestamp()) and (runs.ordering_key || '') is null
       and runs.state = 'queued' and runs.queue || '' = any(%(queues)s::text[]) and runs.task = any(%(tasks)s::text[])
       and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))
       and not exists (
            select from queue_service.queues
             where queues.name = runs.queue
               and ({is_paused} or coalesce({vacant} < 1, false) or coalesce({tokens} < 1, false)))
)
