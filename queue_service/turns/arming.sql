-- Arming turns: from then on each is owed an ending. `turn_outcomes` has a row for each turn from its arming on, so that
-- its one unique key decides whether a turn may be armed.

-- define: asked
-- The turns of the parameter, as the table `asked`, each once. What names no organization is of the session's, if it has one.
asked as materialized (
    select distinct on (deployment, message_id) deployment, message_id, stream, platform, channel_id, user_id, metadata,
           admission, execution, total, coalesce(organization_id, queue_service.organization()) as organization_id,
           clock_timestamp() as at
      from jsonb_to_recordset(%(turns)s::jsonb)
        as asked (deployment text, message_id text, stream text, platform text, channel_id text, user_id text,
                  organization_id text, metadata jsonb, admission interval, execution interval,
                  total interval)
     order by deployment, message_id
)

-- define: is_opened
-- Whether the turn `asked` was new, and is being armed by this statement.
((asked.deployment, asked.message_id) in (select opened.deployment, opened.message_id from opened)) is true

-- define: marker_columns
(deployment, message_id, stream, platform, channel_id, user_id, organization_id, metadata, admission, execution,
        deadline, ends_by, run_id)

-- define: marker_values
asked.deployment, asked.message_id, asked.stream, asked.platform, asked.channel_id, asked.user_id,
           asked.organization_id, asked.metadata, asked.admission, asked.execution,
           asked.at + least(asked.admission, asked.total), asked.at + asked.total

-- define: opened
-- Makes `opened`, those of the turns `asked` that are new, their streams, and `known`, those that are not. A stream that is
-- not found because it is another organization's is updated, which the database refuses: nothing of it would be changed.
opened as (
    insert into queue_service.turn_outcomes (deployment, message_id, stream, organization_id)
    select deployment, message_id, stream, organization_id from asked
     order by deployment, message_id
        on conflict (deployment, message_id) do nothing
    returning deployment, message_id
), known_streams as materialized (
    select s.stream from queue_service.streams as s where s.stream = any(array(select distinct asked.stream from asked))
), streams as (
    -- Looked for first: an insert that meets the row would wait for whoever is writing to it.
    insert into queue_service.streams (stream, organization_id)
    select distinct on (asked.stream) asked.stream, asked.organization_id from asked
     where {is_opened} and asked.stream not in (select known_streams.stream from known_streams)
     order by asked.stream, asked.organization_id
        on conflict (stream) do update
       set organization_id = coalesce(streams.organization_id, excluded.organization_id)
     where streams.organization_id is distinct from excluded.organization_id
), known as (
    select o.* from asked cross join lateral (
        select o.deployment, o.message_id, o.kind from queue_service.turn_outcomes as o
         where o.deployment = asked.deployment and o.message_id = asked.message_id limit 1
    ) as o
)

-- define: stored
-- Stores the run of a turn, if it is `wanted`.
stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, ordering_key, max_attempts,
                                    retry_delay, timeout, metadata, organization_id)
    select %(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval, %(metadata)s::jsonb,
           coalesce(%(organization_id)s, queue_service.organization())
      from (select coalesce(%(run_at)s::timestamptz,
                            clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due
     where exists (select from wanted)
    returning id
)

-- name: arm
-- Owe each of these turns an ending. `turns` is a JSON array of objects. Rows: 'armed', or 'known' for one that was armed
-- before (see `standing` for how it stands). A turn without a row is being armed by another session: send it again.
-- writes: turn_outcomes, turn_markers, streams
with {asked}, {opened}, armed as (
    insert into queue_service.turn_markers {marker_columns}
    select {marker_values}, null from asked where {is_opened}
    returning deployment, message_id
)
select deployment, message_id, 'armed' from armed
union all
select known.deployment, known.message_id, 'known' from known

-- name: dispatch
-- Arm one turn and store the run that works on it, both or neither; or only the run, where the turn is armed and has none.
-- Row: 'dispatched' or 'known'; the id of the turn's run; how the turn ended. No row, or a known turn with neither: another
-- session is dispatching it, send it again.
-- writes: turn_outcomes, turn_markers, streams, runs
with {asked}, {opened}, pending as (
    -- Locked, so that of two sessions that dispatch an armed turn, the second finds its run.
    select m.*
      from asked
     cross join lateral (
        select m.deployment, m.message_id from queue_service.turn_markers as m
         where m.deployment = asked.deployment and m.message_id = asked.message_id and m.run_id is null
         limit 1 for update
     ) as m
), wanted as (
    select from opened union all select from pending
), {stored}, armed as (
    insert into queue_service.turn_markers {marker_columns}
    select {marker_values}, stored.id from asked cross join stored where {is_opened}
), begun as (
    update queue_service.turn_markers as m
       set run_id = stored.id, deadline = least(clock_timestamp() + m.admission, m.ends_by), admitted_at = null
      from stored
     where m.deployment = (select pending.deployment from pending)
       and m.message_id = (select pending.message_id from pending)
)
select 'dispatched', id, null, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end
  from stored
union all
select 'known', (select m.run_id from queue_service.turn_markers as m
                  where m.deployment = known.deployment and m.message_id = known.message_id), known.kind, null
  from known
 where not exists (select from stored)

-- name: send
-- Take in a message: store it as an event of its stream, arm its turn, and store the run that works on it, all or nothing,
-- and once. Where runs of its lane are before it, a second event says how many. A stream that was new or suspended is active
-- then. Row: 'sent' or 'known', the seq of the event and the digest of the message (null for a turn that was armed by other
-- means); 'ended' where the stream takes no messages. No row: another session is sending it, send it again; and so where this
-- is a not-null violation: the stream was closed after this statement began to look, its head was not moved, and a receipt
-- without a seq takes all back.
-- writes: turn_outcomes, turn_markers, streams, events, runs, receipts
with {asked}, open_streams as materialized (
    select asked.stream from asked
     where (select s.state from queue_service.streams as s where s.stream = asked.stream limit 1)
           not in ('closing', 'ended') is not false
), known as materialized (
    select o.* from asked cross join lateral (
        select o.deployment from queue_service.turn_outcomes as o
         where o.deployment = asked.deployment and o.message_id = asked.message_id limit 1) as o
), opened as (
    insert into queue_service.turn_outcomes (deployment, message_id, stream, organization_id)
    select deployment, message_id, stream, organization_id from asked where exists (select from open_streams)
        on conflict (deployment, message_id) do nothing
    returning deployment, message_id
), ahead as materialized (
    select count(*)::integer as runs, (count(*) > 0)::integer as events
      from (select from queue_service.runs where runs.queue = %(queue)s and runs.ordering_key = %(ordering_key)s
             order by runs.queue, runs.ordering_key, runs.id limit 1000) as others
), heads as (
    insert into queue_service.streams (stream, head, state, organization_id)
    select asked.stream, 1 + ahead.events, 'active', asked.organization_id from asked, ahead
     where {is_opened}
        on conflict (stream) do update
       set head = streams.head + excluded.head,
           organization_id = coalesce(streams.organization_id, excluded.organization_id),
           state = case when streams.state in ('created', 'suspended') then 'active' else streams.state end
     where streams.state not in ('closing', 'ended')
    returning stream, head, head - (select ahead.events from ahead) as seq, organization_id
), wanted as (
    -- Its id is given while the stream is locked: the order of the messages is that of their runs.
    select from heads
), {stored}, said as (
    insert into queue_service.events (stream, seq, kind, organization_id, body)
    select stream, seq, 'message', organization_id, %(message)s::jsonb from heads
    union all
    select heads.stream, head, 'queued', heads.organization_id,
           pg_catalog.jsonb_build_object('message_id', asked.message_id, 'ahead', ahead.runs)
      from heads, ahead, asked where ahead.events = 1
), armed as (
    insert into queue_service.turn_markers {marker_columns}
    select {marker_values}, stored.id from asked cross join stored where {is_opened}
), receipt as (
    insert into queue_service.receipts (deployment, message_id, seq, digest, organization_id)
    select deployment, message_id, (select heads.seq from heads), %(digest)s, organization_id from asked where {is_opened}
    returning seq, digest
)
select 'sent', seq, digest, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end,
       case when %(notify)s then pg_notify('queue_service_events', seq::text || ' ' || %(stream)s::text)::text end
  from receipt
union all
select 'known', r.seq, r.digest, null, null
  from asked left join lateral (
    select receipts.seq, receipts.digest from queue_service.receipts
     where receipts.deployment = asked.deployment and receipts.message_id = asked.message_id limit 1) as r on true
 where exists (select from known) and not exists (select from opened)
union all
select 'ended', null, null, null, null from asked
 where not exists (select from open_streams) and not exists (select from known)
