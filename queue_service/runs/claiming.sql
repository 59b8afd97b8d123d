-- Taking runs that are due: a scan finds where claims begin, a claim takes what is free from there on.
--
-- The planner's picture of `runs` is always out of date (vacuum may find it empty a moment before a million rows
-- come), and with zero rows expected it will read the whole table as the outer side of a join. So `runs` is never
-- joined: it is reached by `id = any(array)` or by an ordered walk along the claim index with a limit, and nothing
-- else. That index holds `id + 0`, so that the first can never be served by the second. The clock is read in a
-- subquery: a volatile function cannot bound an index scan.
--
-- Runs with an ordering key are in no claim index: they stand in the lane of their queue and key, and `lanes` has a
-- row for each, kept by triggers. A lane is claimed from while fewer of its runs are running than it is wide, which is one
-- unless its queue says otherwise; what is taken is its head, the oldest run that may run. Not yet in the lane is what was
-- enqueued for later and never begun, no longer in it what has expired; a head that was begun and waits for its next attempt
-- keeps its place, and the lane waits with it. The row says which task is next, so that lanes which a worker cannot go on
-- with cost it nothing; where a claim finds that this is not so, or that nothing is due, the lane is tended.
-- Locks: a claim takes lanes, then their queued runs, and waits for neither. All others take runs by id, then lanes by queue
-- and key.
--
-- A queue may have a limit: how many of its runs go on at once, or how many may begin in a time. Such a queue is
-- passed over by the claims of the others, which then pay nothing for it, and has claims of its own. What runs is
-- counted from the leases that those claims marked, so that no counter can drift. The count comes from the snapshot,
-- but nothing can have made it greater since: each such claim changes `claims` of the queue's row, and one whose
-- snapshot shows another number than the row it then locks takes nothing.
--
-- A run that is `reserved_for` an owner is for a second, from its run_at on, that owner's to claim. After that it is
-- anyone's, so that an owner who died delays it and no more. A lane says whose its head is, and for that second the others
-- do not look at it: a look would lock it, and the owner would step over it.

-- define: is_paused
-- Of a row of `queues`, as the three after it.
queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > (select clock_timestamp())

-- define: is_limited
(queues.max_running is not null or queues.rate is not null)

-- define: tokens
-- How many more may begin by the rate, a token each; null where there is none.
least(queues.burst::float8, queues.tokens + extract(epoch from clock_timestamp() - queues.tokens_at)::float8
                                                     * queues.rate::float8 / extract(epoch from queues.period)::float8)

-- define: vacant
-- How many more may run; null where no limit says so.
case when queues.max_running is not null then queues.max_running - (
                    select count(*) from queue_service.runs
                     where runs.id = any(array(
                            select pg_catalog.unnest(leases.run_ids) from queue_service.leases where leases.limited))
                       and runs.queue = queues.name and runs.state = 'running') end

-- define: is_for_us
(runs.reserved_for is null or runs.reserved_for = %(owner)s::text
                or runs.run_at < (select clock_timestamp()) - interval '1 second')

-- define: lane_is_for_us
(lanes.reserved_for is null or lanes.reserved_for = %(owner)s::text
                or lanes.next_at < (select clock_timestamp()) - interval '1 second')

-- define: known
-- The tasks by which lanes are looked for: the claimant's, and that of a lane whose head nobody has looked at.
pg_catalog.unnest(%(tasks)s::text[] operator(pg_catalog.||) '{""}'::text[]) as known (task)

-- define: is_claimable
runs.run_at <= (select clock_timestamp()) and runs.state = 'queued' and runs.losses = 0
               and runs.task = any(%(tasks)s::text[])
               and (runs.expires_at is null or runs.expires_at > (select clock_timestamp()))

-- name: scan
-- For each priority of each queue where something is due, the highest `most` of a queue: the first run that a claim could
-- take, which is where claims may start to look. Paused queues are left out. Distinct priorities are found by hopping along
-- the index, two descents each. A row without a priority says that a lane of the queue is to be looked at. The first column
-- is the time of the scan; it comes even where nothing is due. The last two say whether the queue has a limit, and how many
-- seconds the look has taken so far: what it waited for before it began, as a lock on the table, is not in it.
with recursive asked (queue) as materialized (
    select each.queue from pg_catalog.unnest(%(queues)s::text[]) as each (queue)
     where not exists (select from queue_service.queues where queues.name = each.queue and {is_paused})
), level (queue, priority, run_at, id, found) as (
    select asked.queue, top.priority, first.run_at, first.id, (first.id is not null)::integer
      from asked
     cross join lateral (
        select runs.priority from queue_service.runs
         where runs.queue = asked.queue and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1
     ) as top
      left join lateral (
        select runs.run_at, runs.id from queue_service.runs
         where runs.queue = asked.queue and runs.priority = top.priority and runs.ordering_key is null
           and {is_claimable} and {is_for_us}
         order by runs.run_at, runs.id + 0 limit 1
      ) as first on true
    union all
    select level.queue, below.priority, first.run_at, first.id, level.found + (first.id is not null)::integer
      from level
     cross join lateral (
        select runs.priority from queue_service.runs
         where runs.queue = level.queue and runs.priority < level.priority and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1
     ) as below
      left join lateral (
        select runs.run_at, runs.id from queue_service.runs
         where runs.queue = level.queue and runs.priority = below.priority and runs.ordering_key is null
           and {is_claimable} and {is_for_us}
         order by runs.run_at, runs.id + 0 limit 1
      ) as first on true
     where level.found < %(most)s
)
select moment.now, due.queue, due.priority, due.run_at, due.id,
       exists (select from queue_service.queues where queues.name = due.queue and {is_limited}),
       extract(epoch from clock_timestamp() - moment.now)::float8
  from (select clock_timestamp() as now) as moment
  left join (
    select level.queue, level.priority, level.run_at, level.id from level where level.id is not null
    union all
    select asked.queue, null, null, null
      from asked
     cross join lateral (
        select true
          from {known}
         cross join lateral (
            select from queue_service.lanes
             where lanes.queue = asked.queue and lanes.task = known.task and lanes.running < lanes.width
               and lanes.next_at <= (select clock_timestamp()) and {lane_is_for_us}
             order by lanes.queue, lanes.task, lanes.next_at limit 1
         ) as each
         limit 1
     ) as lane
  ) as due on true

-- define: new_lease
-- One for all that was picked; none where nothing was.
insert into queue_service.leases (worker_id, expires_at, run_ids, limited, final_tasks)
    select %(worker_id)s, clock_timestamp() + %(lease)s::interval, pg_catalog.array_agg(picked.id), %(limited)s::boolean,
           %(final_tasks)s::text[]
      from picked having count(*) > 0
    returning id

-- define: take_picked
-- Takes what was picked. That is locked, and so still queued; the guard stands where it is written all the same. A run whose
-- attempts have come to the end of the integers comes without its payload: no claim on it differs from the one before.
update queue_service.runs
   set state = 'running', attempt = runs.attempt + (runs.attempt < 2147483647)::integer, claimed_at = clock_timestamp(),
       lease_id = lease.id
  from lease
 where runs.id = any(array(select picked.id from picked)) and runs.state = 'queued'
returning runs.id, runs.queue, runs.task, case when runs.attempt < 2147483647 then runs.payload::text end, runs.attempt,
          runs.failures, runs.losses, runs.priority, runs.created_at, runs.run_at, runs.expires_at, runs.max_attempts,
          runs.retry_delay, runs.timeout,
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
-- Makes `picked`, the runs that may begin of free lanes of the queues `asked` for. What is wanted is shared out among the
-- tasks that lanes wait with, so that none waits for another, and then among the lanes, of which each gives at most what its
-- width leaves. And `left_over`: of a queue, whether free lanes gave nothing, and are to be tended, and whether a claim may
-- get more though it did not get all that was wanted.
due as materialized (
    select asked.queue, asked.wanted, asked.width, known.task,
           ceil(asked.wanted::float8 / (count(*) over (partition by asked.queue))::float8)::integer as share
      from asked
     cross join {known}
     cross join lateral (
        select from queue_service.lanes
         where lanes.queue = asked.queue and lanes.task = known.task and lanes.running < lanes.width
           and lanes.running < asked.width and lanes.next_at <= (select clock_timestamp()) and {lane_is_for_us}
         order by lanes.queue, lanes.task, lanes.next_at limit 1
     ) as lane
     where asked.wanted > 0
), free as materialized (
    -- The row of a lane that has changed since this statement began does not show by its new place. What is seen of such a
    -- lane may not be its order now; it is left for the next claim.
    select locked.*, due.wanted,
           ceil(due.wanted::float8 / (count(*) over (partition by due.queue))::float8)::integer as share,
           due.share < due.wanted and count(*) over (partition by due.queue, due.task) = due.share as has_more_beside,
           -- (As `exists`, it might be answered from a table of all lanes.)
           (select true from queue_service.lanes where lanes.ctid = locked.place) is not null as is_unchanged
      from due
     cross join lateral (
        select lanes.ctid as place, lanes.queue, lanes.ordering_key, least(lanes.width, due.width) - lanes.running as room
          from queue_service.lanes
         where lanes.queue = due.queue and lanes.task = due.task and lanes.running < lanes.width
           and lanes.running < due.width and lanes.next_at <= (select clock_timestamp()) and {lane_is_for_us}
         order by lanes.queue, lanes.task, lanes.next_at
         limit due.share
           for update skip locked
     ) as locked
), heads as materialized (
    -- One that waits for its next attempt has a place; behind one that is due and for another worker, none begins.
    select free.place, free.queue, free.ordering_key, free.wanted, head.id, head.is_due,
           row_number() over of_lane as rank, bool_and(head.is_ours or not head.is_due) over of_lane as is_reached
      from free
     cross join lateral (
        select runs.id, runs.run_at <= (select clock_timestamp()) as is_due,
               runs.task = any(%(tasks)s::text[]) and {is_for_us} as is_ours
          from queue_service.runs
         where runs.queue = free.queue and runs.ordering_key = free.ordering_key
           and runs.state = 'queued' and coalesce(runs.expires_at, 'infinity') > (select clock_timestamp())
           and (runs.attempt > 0 or runs.run_at <= (select clock_timestamp()))
         order by runs.queue, runs.ordering_key, runs.id limit least(free.room, free.share)
     ) as head
     where free.is_unchanged
    window of_lane as (partition by free.place order by head.id)
), candidates as materialized (
    -- The first of each lane before the second of any.
    select heads.*, row_number() over (partition by heads.queue order by heads.rank, heads.id) as number
      from heads where heads.is_due and heads.is_reached
), picked as materialized (
    select held.id, held.queue, held.place
      from (
        -- Nor does one begin behind one that somebody has locked, to cancel it, say.
        select locked.id, candidates.queue, candidates.place,
               bool_and(locked.id is not null) over (partition by candidates.place order by candidates.rank) as is_reached
          from candidates
          left join lateral (
            -- It may have been replaced since. That it was claimed and put off would show in the row of its lane.
            select runs.id from queue_service.runs
             where runs.id = candidates.id and runs.state = 'queued' and runs.run_at <= (select clock_timestamp())
               and runs.task = any(%(tasks)s::text[])
               and (runs.queue, runs.ordering_key) is not distinct from (candidates.queue, candidates.ordering_key)
             limit 1 for update skip locked
          ) as locked on true
         where candidates.number <= candidates.wanted
      ) as held
     where held.is_reached
), left_over as materialized (
    select free.queue, bool_or(free.is_unchanged and free.place not in (select picked.place from picked)) as is_barren,
           bool_or(not free.is_unchanged or (free.has_more_beside or free.share < free.room)
                                            and free.queue in (select picked.queue from picked)) as has_more
      from free group by free.queue
)

-- name: claim_lanes
-- Take runs of lanes that are free, from each queue at most as many as are `wanted`: from each lane its head, and as many
-- behind it as its width leaves. A run that somebody holds (to cancel it, say) is left alone, and so are those behind it.
-- Rows: for each queue a null and what is `left_over`, with each run that was taken.
-- writes: runs, leases
with asked as materialized (
    select asked.queue, asked.wanted, coalesce((select queues.max_running_per_key from queue_service.queues
                                                 where queues.name = asked.queue), 1) as width
      from unnest(%(queues)s::text[], %(wanted)s::integer[]) as asked (queue, wanted)
     where asked.queue not in (select queues.name from queue_service.queues where {is_paused} or {is_limited})
), {from_lanes}, lease as (
    {new_lease}
), taken as (
    {take_picked}
)
select taken.*, asked.queue, null::float8,
       left_over.is_barren, left_over.has_more
  from asked left join taken on taken.queue = asked.queue left join left_over on left_over.queue = asked.queue

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
    select picked.queue, (count(*))::float8 as runs from picked group by picked.queue
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
       case when asked.tokens - coalesce((select took.runs from took where took.queue = asked.queue), 0) < 1::float8
            then extract(epoch from asked.period)::float8 / asked.rate::float8
                 * (1::float8 - asked.tokens
                    + coalesce((select took.runs from took where took.queue = asked.queue), 0)) end,
       false, false
  from asked left join taken on taken.queue = asked.queue

-- name: claim_limited_lanes
-- As `claim_lanes`, of queues that have a limit, and within it. Rows as of `claim_limited` and `claim_lanes`.
-- writes: runs, leases, queues
with given as materialized (
    select given.queue, given.wanted from unnest(%(queues)s::text[], %(wanted)s::integer[]) as given (queue, wanted)
), {within_limits}, {from_lanes}, {counted_in}, lease as (
    {new_lease}
), taken as (
    {take_picked}
)
select taken.*, asked.queue,
       case when asked.tokens - coalesce((select took.runs from took where took.queue = asked.queue), 0) < 1::float8
            then extract(epoch from asked.period)::float8 / asked.rate::float8
                 * (1::float8 - asked.tokens
                    + coalesce((select took.runs from took where took.queue = asked.queue), 0)) end,
       left_over.is_barren, left_over.has_more
  from asked left join taken on taken.queue = asked.queue left join left_over on left_over.queue = asked.queue

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
               and ({is_paused} or coalesce({vacant} < 1, false) or coalesce({tokens} < 1::float8, false)))
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
               and ({is_paused} or coalesce({vacant} < 1, false) or coalesce({tokens} < 1::float8, false)))
)
