-- Deliveries: runs that hand an event to the renderer of its platform. Those of one platform and channel are a lane, so that
-- they are rendered one after the other, in the order in which they were stored. (The endings of turns store their own:
-- `store_endings`, migration 0014.)
--
-- What a renderer's process writes is fenced by its claim. Locks: the run, then the outcome of its turn.

-- name: deliver
-- Store the delivery of an event, reserved for the process that holds the channel's connection. Row: the id of the run.
-- writes: runs
insert into queue_service.runs (queue, task, ordering_key, payload, organization_id, max_attempts, reserved_for)
values ('thread_response', 'deliver',
        length(%(platform)s::text)::text || ':' || %(platform)s::text || ':' || %(channel_id)s::text,
        %(payload)s::jsonb, %(organization_id)s, %(max_attempts)s, (
            select owner from queue_service.connections
             where platform = %(platform)s and channel_id = %(channel_id)s and expires_at > clock_timestamp()))
returning id

-- name: deliver_seq
-- As `deliver`, of the event that stands there in the stream, if it is not an ending: those are delivered by themselves.
-- Nothing is stored for platform `api`. Row: the kind of the event and the id of the run. None: there is no such event.
-- writes: runs
with event as materialized (
    select e.kind, e.terminal from queue_service.events as e
     where e.stream = %(payload)s::jsonb ->> 'stream'::text and e.seq = %(seq)s
), stored as (
    insert into queue_service.runs (queue, task, ordering_key, payload, organization_id, max_attempts, reserved_for)
    select 'thread_response', 'deliver',
           length(%(platform)s::text)::text || ':' || %(platform)s::text || ':' || %(channel_id)s::text,
           %(payload)s::jsonb || pg_catalog.jsonb_build_object('seq', %(seq)s::bigint, 'kind', event.kind),
           %(organization_id)s, %(max_attempts)s, (
            select owner from queue_service.connections
             where platform = %(platform)s and channel_id = %(channel_id)s and expires_at > clock_timestamp())
      from event where not event.terminal and %(platform)s <> 'api'
    returning id
)
select event.kind, (select stored.id from stored) from event

-- name: note
-- Replace the metadata of a claimed run. Row: its id. None: the claim was lost.
-- writes: runs
update queue_service.runs set metadata = %(metadata)s::jsonb
 where id = %(run_id)s and attempt = %(attempt)s and state = 'running'
returning id

-- name: shown
-- Remember under which id a platform shows a turn, for as long as the turn is remembered. Row: its message id. None: the
-- claim was lost, or the turn is not remembered. Its outcome is kept from being pruned meanwhile: the two go together.
-- writes: renderings
with held as materialized (
    select runs.id from queue_service.runs
     where runs.id = %(run_id)s and runs.attempt = %(attempt)s and runs.state = 'running'
       for update
), turn as materialized (
    select o.deployment, o.message_id from queue_service.turn_outcomes as o
     where o.deployment = %(deployment)s and o.message_id = %(message_id)s and (select count(*) from held) > 0
       for key share
), stored as (
    insert into queue_service.renderings as r (deployment, message_id, platform_message_id)
    select turn.deployment, turn.message_id, %(platform_message_id)s from turn
        on conflict (deployment, message_id) do update
       set platform_message_id = excluded.platform_message_id, updated_at = clock_timestamp()
     where r.platform_message_id <> excluded.platform_message_id
)
select turn.message_id from turn

-- name: platform_message_id
-- Row: the id under which the platform shows a turn. None: it was not given one.
select platform_message_id from queue_service.renderings
 where deployment = %(deployment)s and message_id = %(message_id)s
