-- Storing runs: one, one in place of another, and many.
--
-- A run that is given no organization is of the session's, if that has one. A singleton key is one of an organization. No
-- `on conflict` names an index: until migration 0026 there are two of singleton keys, and the older one, which knows no
-- organizations, must not raise an error that would end the transaction of a caller.

-- define: holders
-- The live run that holds a singleton key of this organization, or of the session's, with its state. Organizations are
-- compared in two ways, since no index serves `is not distinct from`: a key that thousands of them have would be looked at in
-- each.
select runs.id, runs.state from queue_service.runs
         where runs.queue = %(queue)s and runs.singleton_key = %(singleton_key)s
           and runs.organization_id = coalesce(%(organization_id)s, queue_service.organization())
        union all
        select runs.id, runs.state from queue_service.runs
         where runs.queue = %(queue)s and runs.singleton_key = %(singleton_key)s
           and runs.organization_id is null and coalesce(%(organization_id)s, queue_service.organization()) is null

-- name: enqueue
-- Store a run, and send its notice if there is one. One row: its id. None: a live run holds the singleton key,
-- and nothing changed.
-- writes: runs
with stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, singleton_key, ordering_key,
                                    max_attempts, retry_delay, timeout, metadata, organization_id)
    select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(singleton_key)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
           %(metadata)s::jsonb, coalesce(%(organization_id)s, queue_service.organization())
      from (select coalesce(%(run_at)s::timestamptz,
                            clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due
        on conflict do nothing
    returning id
)
select id, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end from stored

-- name: replace
-- Store a run, or put it in the place of the queued one that holds its singleton key, whose id it keeps.
-- None: the holder is running, or came or went at this moment, and nothing changed.
-- writes: runs
with due as materialized (
    select coalesce(%(run_at)s::timestamptz, clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at
), held as materialized (
    select id from queue_service.runs
     where id = any(array(select holders.id from ({holders}) as holders))
       for update
), replaced as (
    update queue_service.runs
       set task = %(task)s, payload = %(payload)s::jsonb, priority = %(priority)s, run_at = (select due.run_at from due),
           expires_at = (select due.run_at from due) + %(expires_in)s::interval, ordering_key = %(ordering_key)s,
           max_attempts = %(max_attempts)s, retry_delay = %(retry_delay)s::interval, timeout = %(timeout)s::interval,
           metadata = %(metadata)s::jsonb, failures = 0, error = null, attempts = null
     where id = any(array(select held.id from held)) and state = 'queued'
    returning id
), stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, singleton_key, ordering_key,
                                    max_attempts, retry_delay, timeout, metadata, organization_id)
    select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(singleton_key)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
           %(metadata)s::jsonb, coalesce(%(organization_id)s, queue_service.organization())
      from due
     where not exists (select from held)
        on conflict do nothing
    returning id
)
select id, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end
  from (select id from replaced union all select id from stored) as kept

-- name: enqueue_all
-- Store runs of several callers, none of which has a singleton key: then nothing is waited for. `runs` is a JSON array of
-- objects. Rows: their ids, in the order of the array. They are stored by lane, so that two such statements lock the lanes
-- they share in one order, and cannot deadlock.
-- writes: runs, runs_id_seq
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
           metadata, coalesce(organization_id, queue_service.organization())
      from asked
     order by queue, ordering_key, id
)
select id from asked order by place

-- name: reserve
-- Ids for runs about to be stored together, ascending, with the time they are due and the time they expire; the
-- organization of the session; and whether row security holds for it, which refuses every COPY. The message is for nobody:
-- with it the statement waits until the ids are used up for good. A sequence writes a record for every 32 ids, and who takes
-- one of the others waits for nothing: a standby that is promoted might not have the record, and give them again.
-- writes: runs_id_seq
select due.run_at, due.run_at + %(expires_in)s::interval,
       array(select pg_catalog.nextval('queue_service.runs_id_seq') from pg_catalog.generate_series(1, %(count)s)),
       queue_service.organization(), pg_catalog.row_security_active('queue_service.runs'),
       pg_catalog.pg_logical_emit_message(true, 'queue_service', 'reserved'::text)::text
  from (select coalesce(%(run_at)s::timestamptz,
                        clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due

-- name: store_reserved
-- Store runs with these ids, all alike but for their payloads: what a COPY does where there is no row security.
-- writes: runs
insert into queue_service.runs (id, queue, task, run_at, expires_at, priority, ordering_key, max_attempts, retry_delay,
                                timeout, metadata, organization_id, payload)
select given.id, %(queue)s, %(task)s, coalesce(%(run_at)s::timestamptz, clock_timestamp()), %(expires_at)s::timestamptz,
       %(priority)s, %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval,
       %(metadata)s::jsonb, %(organization_id)s, given.payload::jsonb
  from rows from (pg_catalog.unnest(%(ids)s::bigint[]), pg_catalog.unnest(%(payloads)s::text[])) as given (id, payload)

-- name: singleton_holder
-- The live run that holds a singleton key of this organization, or of the session's, if there is one, and its state.
{holders}

-- name: are_keys_shared
-- Whether a singleton key is still one for all organizations, since migration 0026 was not applied yet.
select pg_catalog.to_regclass('queue_service.runs_singleton_idx') is not null
