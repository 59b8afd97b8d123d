-- Every statement about worker processes. A worker's id is new at each start and never reused, so that a restarted
-- process is nobody's heir. Nothing depends on these rows: what a worker holds is written in `leases`.

-- name: join
-- Enter the roster. Row: the worker's id. A trigger refuses code that is too old for this database by now.
-- writes: workers
insert into queue_service.workers (name, version, queues, fleet, revision)
values (%(name)s, %(version)s, %(queues)s::jsonb, %(fleet)s, %(revision)s)
returning id

-- name: beat
-- Say that the worker is alive, and which of its services are failing, unless another session has its row locked: a worker
-- that waited here would lose its leases. Row: those of its fleet that were seen within `silence`, and what time it is.
-- writes: workers
with beaten as (
    update queue_service.workers set seen_at = clock_timestamp(), failing = %(failing)s::text[]
     where id = any(array(select id from queue_service.workers where id = %(worker_id)s for update skip locked))
)
select array(select id from queue_service.workers
              where fleet = (select fleet from queue_service.workers where id = %(worker_id)s)
                and seen_at > clock_timestamp() - %(silence)s::interval),
       extract(epoch from clock_timestamp())::float8

-- name: leave
-- Leave the roster, as a worker that stops does.
-- writes: workers
delete from queue_service.workers where id = %(worker_id)s

-- name: listed
-- The workers, how many runs each holds, and whether each was seen within `silence`.
select workers.id, workers.name, workers.version, workers.queues::text, workers.started_at, workers.seen_at,
       (select count(*) from queue_service.runs
         where id = any(array(select pg_catalog.unnest(run_ids) from queue_service.leases where worker_id = workers.id))
           and lease_id = any(array(select leases.id from queue_service.leases where worker_id = workers.id))),
       workers.seen_at > clock_timestamp() - %(silence)s::interval, workers.failing
  from queue_service.workers
 order by workers.id

-- name: prune
-- Delete the workers that were not seen for `silence`. Rows: their ids.
-- writes: workers
delete from queue_service.workers where seen_at < clock_timestamp() - %(silence)s::interval returning id
