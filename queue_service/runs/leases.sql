-- The leases under which workers hold what they claimed: kept up while a worker lives, swept when it does not.
-- A lease lists the runs that one statement claimed. Locks are taken leases first, then runs by ascending id, then those of
-- their turns, then lanes by queue and key.

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
 where id = any(array(select pg_catalog.unnest(run_ids) from queue_service.leases where id = any(%(leases)s::bigint[])))
   and lease_id = any(%(leases)s::bigint[]) and cancel_requested

-- name: release_unheard
-- Give back what a worker has claimed without knowing it: all leases of its but those it knows. None of their runs was
-- begun. Rows: the ids of these runs.
-- writes: leases, runs
with unheard as materialized (
    delete from queue_service.leases
     where worker_id = %(worker_id)s and id <> all(%(known)s::bigint[])
    returning id, run_ids
), moved as materialized (
    select id, queue, ordering_key from queue_service.runs
     where id = any(array(select pg_catalog.unnest(unheard.run_ids) from unheard))
       and lease_id = any(array(select unheard.id from unheard)) and state = 'running'
     order by id
       for update
), {lock_lanes}
update queue_service.runs set state = 'queued', lease_id = null, claimed_at = null
 where id = any(array(select moved.id from moved)) and (select count(*) from locked_lanes) >= 0
returning id

-- define: take_lost
-- Takes what is left of the runs of `lapsed` (leases with their runs, their worker, and the tasks that are not to be begun
-- twice). Each goes back to its place in the queue with one loss more, or ends: `cancelled` if that was asked, `failed` at
-- `max_losses`, and at the first loss if its task is among those. Rows: run id, its state now, its queue and priority.
held as materialized (
    select id, queue, ordering_key, cancel_requested, losses, metadata -> 'turn'::text as turn,
           cancel_requested or least(losses, 2147483646) + 1 >= %(max_losses)s
               or coalesce(task = any((select lapsed.final_tasks from lapsed where lapsed.id = lease_id)::text[]), false)
               as is_over
      from queue_service.runs
     where id = any(array(select pg_catalog.unnest(lapsed.run_ids) from lapsed))
       and lease_id = any(array(select lapsed.id from lapsed)) and state = 'running'
     order by id
       for update
), over as materialized (
    select id, turn, case when cancel_requested then 'cancelled' else 'failed' end as state,
           pg_catalog.jsonb_build_object('reason', 'worker_lost', 'message', pg_catalog.format(
               'The worker was lost while its run was with it, for the %%s. time.', least(losses, 2147483646) + 1)) as error
      from held where is_over and turn is not null
), {end_turns}, moved as materialized (
    select * from held where (select count(*) from turns_ended) >= 0
), {lock_lanes}, gone as (
    delete from queue_service.runs
     where id = any(array(select moved.id from moved where moved.is_over))
       and (select count(*) from locked_lanes) >= 0
    returning runs.*
), {leave_lanes}, ended as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at,
           (select lapsed.worker_id from lapsed where lapsed.id = gone.lease_id), attempt, failures,
           least(losses, 2147483646) + 1, max_attempts, priority,
           case when cancel_requested then 'cancelled' else 'failed' end, queue, task, payload, singleton_key,
           ordering_key, organization_id, retry_delay, timeout, metadata, null,
           pg_catalog.jsonb_build_object('reason', 'worker_lost', 'message',
               pg_catalog.format('The worker was lost while this run was with it, for the %%s. time.',
                                 least(losses, 2147483646) + 1)
               || case
               when coalesce(task = any((select lapsed.final_tasks from lapsed where lapsed.id = lease_id)::text[]), false)
               then ' Its task says on_lost="fail": it is begun again only if you retry it.' else '' end), attempts
      from gone
    returning id, state, queue, priority
), queued as (
    update queue_service.runs
       set state = 'queued', lease_id = null, claimed_at = null, losses = least(losses, 2147483646) + 1,
           error = pg_catalog.jsonb_build_object(
               'reason', 'worker_lost', 'message', 'The worker was lost while this run was with it.'), progress = null,
           attempts = (select {attempts_and_this}
                         from (select lapsed.worker_id, clock_timestamp() as ended_at, pg_catalog.jsonb_build_object(
                                   'reason', 'worker_lost', 'message', 'The worker was lost while this run was with it.')
                                   as error
                                 from lapsed where lapsed.id = runs.lease_id) as this)
     where id = any(array(select moved.id from moved where not moved.is_over))
    returning id, state, queue, priority
)
select id, state, queue, priority from queued where (select count(*) from locked_lanes) >= 0
union all
select id, state, queue, priority from ended where (select count(*) from lanes_left) >= 0

-- name: sweep
-- Take the leases that have lapsed, at most `limit` of them, `excluding` these, and with them the runs they held. The guard
-- stands in the DELETE: an extend that commits first wins. With a lease would go the claim on runs that are hidden from this
-- role: whoever does not see them all takes none.
-- writes: leases, runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with lapsed as materialized (
    delete from queue_service.leases
     where id = any(array(select id from queue_service.leases
                           where expires_at < (select clock_timestamp()) and id <> all(%(excluding)s::bigint[])
                           order by expires_at limit %(limit)s for update skip locked))
       and expires_at < clock_timestamp() and (select queue_service.sees_all_runs())
    returning id, worker_id, run_ids, final_tasks
), {take_lost}

-- name: sweep_lease
-- As `sweep`, this lease alone.
-- writes: leases, runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with lapsed as materialized (
    delete from queue_service.leases
     where id = %(lease_id)s and expires_at < clock_timestamp() and (select queue_service.sees_all_runs())
    returning id, worker_id, run_ids, final_tasks
), {take_lost}

-- name: sweep_run
-- As `sweep`, one run of a lease, which stays: it holds what cannot be taken.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with lapsed as materialized (
    select id, worker_id, array[%(run_id)s::bigint] as run_ids, final_tasks from queue_service.leases
     where id = %(lease_id)s and expires_at < clock_timestamp()
       for update
), {take_lost}

-- name: lapsed
-- The leases that have lapsed, at most `limit` of them. Rows: their ids and those of their runs.
select id, run_ids from queue_service.leases
 where expires_at < (select clock_timestamp()) order by expires_at limit %(limit)s

-- name: orphans
-- Of the `scan_limit` runs after an id, those that are running under a lease which does not exist (any more), as an
-- asynchronous failover may leave them. What was claimed in the last minute is left out: its lease may be newer than what
-- this statement sees. Row: the last id that was looked at (null: there was none), theirs, and the lanes of which runs stand
-- here but no row: queues and keys.
with looked as materialized (
    select id, state, lease_id, claimed_at, queue, ordering_key from queue_service.runs
     where id > %(after)s order by id limit %(scan_limit)s
), laneless as materialized (
    select laned.queue, laned.ordering_key
      from (select distinct looked.queue, looked.ordering_key from looked where looked.ordering_key is not null) as laned
      left join lateral (
        select true as is_there from queue_service.lanes
         where lanes.queue = laned.queue and lanes.ordering_key = laned.ordering_key limit 1
      ) as lane on true
     where lane.is_there is null
)
select (select max(looked.id) from looked),
       array(select looked.id from looked
              where looked.state = 'running' and looked.claimed_at < (select clock_timestamp()) - interval '1 minute'
                and looked.lease_id not in (select leases.id from queue_service.leases)),
       array(select laneless.queue from laneless order by laneless.queue, laneless.ordering_key),
       array(select laneless.ordering_key from laneless order by laneless.queue, laneless.ordering_key)

-- name: sweep_orphans
-- As `sweep`, such runs.
-- writes: runs, finished_runs, turn_markers, turn_outcomes, streams, events, lanes
with lapsed as materialized (
    select lease_id as id, null::bigint as worker_id, pg_catalog.array_agg(id) as run_ids,
           %(final_tasks)s::text[] as final_tasks
      from queue_service.runs
     where id = any(%(ids)s::bigint[]) and state = 'running'
       and claimed_at < (select clock_timestamp()) - interval '1 minute'
       and lease_id not in (select leases.id from queue_service.leases)
     group by lease_id
), {take_lost}

-- name: busy_leases
-- Of the leases that have lapsed, at most `limit` of them, those that hold a run which another session has locked, or the
-- lane of which it has: a sweep would wait for it. Rows: lease ids.
with lapsed as materialized (
    select id, run_ids from queue_service.leases
     where expires_at < (select clock_timestamp())
     order by expires_at limit %(limit)s
), mine as materialized (
    select runs.id, runs.lease_id, runs.queue, runs.ordering_key from queue_service.runs
     where runs.id = any(array(select pg_catalog.unnest(lapsed.run_ids) from lapsed))
       and runs.lease_id = any(array(select lapsed.id from lapsed)) and runs.state = 'running'
), {unlocked}
select distinct mine.lease_id from mine
 where mine.id not in (select unlocked.id from unlocked)
    or mine.ordering_key is not null
       and (mine.queue, mine.ordering_key) not in (select passable.queue, passable.ordering_key from passable)
