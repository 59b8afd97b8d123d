-- Storing runs: one, one in place of another, and many.

-- name: enqueue
-- Store a run, and send its notice if there is one. One row: its id. None: a live run holds the singleton key,
-- and nothing changed.
-- writes: runs
with stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, singleton_key, ordering_key,
                                    max_attempts, retry_delay, timeout, metadata, organization_id)
    select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(singleton_key)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
           %(metadata)s::jsonb, %(organization_id)s
      from (select coalesce(%(run_at)s::timestamptz,
                            clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due
        on conflict (queue, singleton_key) where singleton_key is not null do nothing
    returning id
)
select id, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end from stored

-- name: replace
-- Store a run, or put it in the place of the queued one that holds its singleton key, whose id it keeps.
-- None: the holder is running, and nothing changed.
-- writes: runs
with stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, singleton_key, ordering_key,
                                    max_attempts, retry_delay, timeout, metadata, organization_id)
    select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(singleton_key)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
           %(metadata)s::jsonb, %(organization_id)s
      from (select coalesce(%(run_at)s::timestamptz,
                            clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due
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

-- name: enqueue_all
-- Store runs of several callers, none of which has a singleton key: then nothing is waited for. `runs` is a JSON array of
-- objects. Rows: their ids, in the order of the array. They are stored by lane, so that two such statements lock the lanes
-- they share in one order, and cannot deadlock.
-- writes: runs
with asked as materialized (
    select pg_catalog.nextval('queue_service.runs_id_seq') as id, asked.*,
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

-- name: reserve
-- Ids for runs about to be copied in, ascending, with the time they are due and the time they expire.
select due.run_at, due.run_at + %(expires_in)s::interval,
       array(select pg_catalog.nextval('queue_service.runs_id_seq') from pg_catalog.generate_series(1, %(count)s))
  from (select coalesce(%(run_at)s::timestamptz,
                        clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due

-- name: singleton_holder
-- The live run that holds a singleton key, if there is one.
select id from queue_service.runs where queue = %(queue)s and singleton_key = %(singleton_key)s
