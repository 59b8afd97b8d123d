-- The leases under which workers hold what they claimed: kept up while a worker lives, swept when it does not.
-- A lease lists the runs that one statement claimed. Locks are taken leases first, then runs by ascending id.

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

-- name: sweep
-- Take the leases that have lapsed, at most `limit` of them, `excluding` these, and with them the runs they held. Each
-- run goes back to its place in the queue with one loss more, or ends: `cancelled` if that was asked, `failed` at
-- `max_losses`, and at the first loss if its task is among those that the lease says are not to be begun twice.
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
    select id, cancel_requested or least(losses, 2147483646) + 1 >= %(max_losses)s
               or coalesce(task = any((select lapsed.final_tasks from lapsed where lapsed.id = lease_id)::text[]), false)
               as is_over
      from queue_service.runs
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
           (select lapsed.worker_id from lapsed where lapsed.id = gone.lease_id), attempt, failures, least(losses, 2147483646) + 1,
           max_attempts, priority, case when cancel_requested then 'cancelled' else 'failed' end, queue, task, payload,
           singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata, null,
           jsonb_build_object('reason', 'worker_lost', 'message',
               format('The worker was lost while this run was with it, for the %%s. time.', least(losses, 2147483646) + 1) || case
               when coalesce(task = any((select lapsed.final_tasks from lapsed where lapsed.id = lease_id)::text[]), false)
               then ' Its task says on_lost="fail": it is begun again only if you retry it.' else '' end), attempts
      from gone
    returning id, state, queue, priority
), queued as (
    update queue_service.runs
       set state = 'queued', lease_id = null, claimed_at = null, losses = least(losses, 2147483646) + 1,
           error = jsonb_build_object(
               'reason', 'worker_lost', 'message', 'The worker was lost while this run was with it.'), progress = null,
           attempts = (select {attempts_and_this}
                         from (select lapsed.worker_id, clock_timestamp() as ended_at, jsonb_build_object(
                                   'reason', 'worker_lost', 'message', 'The worker was lost while this run was with it.')
                                   as error
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
select distinct mine.lease_id from mine
 where mine.id not in (select unlocked.id from unlocked)
    or mine.ordering_key is not null
       and (mine.queue, mine.ordering_key) not in (select passable.queue, passable.ordering_key from passable)
