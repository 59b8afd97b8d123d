-- Every statement about turns. An armed turn is a row of `turn_markers`; deleting it is the election of whoever writes the
-- ending, and the ending is written by the very statement that deletes it. `turn_outcomes` has a row for each turn from
-- its arming on, so that its one unique key decides whether a turn may be armed.
--
-- Locks are taken in this order: outcomes, markers, streams; those of one kind by ascending key. A statement that ends
-- turns touches their outcomes last all the same: it holds the marker, and nobody else writes the outcome of a turn
-- whose marker is held.
--
-- A plan that was made while a table was empty is kept when it is full, and as a join it would read the whole of it. So no
-- table is joined: a row is looked up in a lateral subquery with a limit, which has no plan but its key; and where a join
-- cannot be avoided (a row that is deleted or updated), its key is bounded by arrays as well. What the statement has made
-- itself is believed to be one row: it is looked up in a hash (an `in` that is no condition by itself, so that it does not
-- become a join) or in an object, not joined by a loop within a loop.

-- define: lapsed
returning {marker_fields}, m.failure_code, m.failure_reason, m.admitted_at, m.admission, m.execution
), taken as materialized (
    select {marker_fields}, 'error' as kind, failure.code, {failure_body} as body
      from deleted as m
     cross join lateral (
        select case when m.failure_code is null then 'worker_unresponsive'
                    when %(sentences)s::jsonb ? m.failure_code then m.failure_code else 'internal_error' end as code,
               null::text as message,
               case when m.failure_code is not null then m.failure_reason
                    when m.admitted_at is null then format('No worker took it up within %%s.', m.admission)
                    else format('No sign of life for %%s.', m.execution) end as reason
    ) as failure
), {ended}
{ended_rows}
 order by stream, seq

-- define: marker_fields
m.deployment, m.message_id, m.stream, m.platform, m.channel_id, m.user_id, m.organization_id, m.metadata, m.armed_at

-- define: ended
due as materialized (
    -- A turn that has had its ending gets no second one, even if somebody put its marker back by hand.
    select taken.*
      from taken
      left join lateral (
        select true as ended from queue_service.turn_outcomes as o
         where o.deployment = taken.deployment and o.message_id = taken.message_id and o.kind is not null
         limit 1
      ) as had on true
     where had.ended is null
), heads as (
    -- The row lock is kept to the end of the transaction: the order of seq is the order of commits, without gaps.
    insert into queue_service.streams (stream, head)
    select due.stream, count(*) from due group by due.stream order by due.stream
        on conflict (stream) do update set head = streams.head + excluded.head
    returning stream, head
), numbered as materialized (
    select due.*,
           ((select jsonb_object_agg(heads.stream, heads.head) from heads) -> due.stream)::bigint
           + 1 - row_number() over (partition by due.stream order by armed_at desc, message_id desc) as seq
      from due
), outcomes as (
    -- The unique key has the last word, whatever this statement's snapshot did not show.
    insert into queue_service.turn_outcomes (deployment, message_id, stream, armed_at, ended_at, seq, kind, code)
    select deployment, message_id, stream, armed_at, clock_timestamp(), seq, kind, code from numbered
     order by deployment, message_id
        on conflict (deployment, message_id) do update
       set stream = excluded.stream, ended_at = excluded.ended_at, seq = excluded.seq, kind = excluded.kind,
           code = excluded.code
     where turn_outcomes.kind is null
    returning deployment, message_id
), endings as materialized (
    select numbered.* from numbered
     where ((deployment, message_id) in (select outcomes.deployment, outcomes.message_id from outcomes)) is true
), stored as (
    insert into queue_service.events (stream, seq, kind, terminal, body)
    select stream, seq, kind, true,
           body || jsonb_build_object('deployment', deployment, 'message_ids', jsonb_build_array(message_id),
                                      'platform', platform, 'organization_id', organization_id)
      from endings
), deliveries as (
    -- For the API the event is the delivery. Elsewhere a renderer has to be told, first of all the one that is connected.
    insert into queue_service.runs (queue, task, payload, organization_id, reserved_for)
    select 'thread_response', 'deliver',
           jsonb_build_object('stream', stream, 'seq', seq, 'kind', kind, 'deployment', deployment,
                              'message_id', message_id, 'platform', platform, 'channel_id', channel_id,
                              'user_id', user_id, 'metadata', metadata),
           organization_id,
           (select owner from queue_service.connections as c
             where c.platform = endings.platform and c.channel_id = endings.channel_id
               and c.expires_at > clock_timestamp())
      from endings where platform <> 'api'
    returning id
)

-- define: asked_endings
asked as materialized (
    select distinct on (deployment, message_id) *
      from rows from (
        jsonb_to_recordset(%(endings)s::jsonb)
            as (call integer, deployment text, message_id text, kind text, code text, body jsonb)
      ) with ordinality as asked (call, deployment, message_id, kind, code, body, place)
     order by deployment, message_id, place
)

-- define: is_asked
m.deployment = asked.deployment and m.message_id = asked.message_id
       and m.deployment = any(array(select asked.deployment from asked))
       and m.message_id = any(array(select asked.message_id from asked))

-- define: free_streams
free as materialized (
    -- An array, not a subquery: as a join the planner would read every stream there is.
    select s.stream from queue_service.streams as s
     where s.stream = any(array(select distinct owed.stream from owed))
     order by s.stream
       for no key update skip locked
), known as materialized (
    select s.stream from queue_service.streams as s
     where s.stream = any(array(select distinct owed.stream from owed))
)

-- define: ended_rows
select endings.deployment, endings.message_id, endings.stream, endings.seq, endings.kind, endings.platform,
       case when %(tell)s then pg_notify('queue_service_events', endings.seq || ' ' || endings.stream)::text end,
       case when %(tell)s and endings.platform <> 'api' then
           pg_notify('queue_service_runs', '0 thread_response')::text end
  from endings

-- define: asked_turns
{asked_turn}, opened as (
    insert into queue_service.turn_outcomes (deployment, message_id, stream)
    select deployment, message_id, stream from asked
     order by deployment, message_id
        on conflict (deployment, message_id) do nothing
    returning deployment, message_id
), known_streams as materialized (
    select s.stream from queue_service.streams as s where s.stream = any(array(select distinct asked.stream from asked))
), streams as (
    -- Looked for first: an insert that meets the row would wait for whoever is writing to it.
    insert into queue_service.streams (stream)
    select distinct asked.stream from asked
     where {is_opened} and asked.stream not in (select known_streams.stream from known_streams)
     order by asked.stream
        on conflict (stream) do nothing
), known as (
    select o.* from asked cross join lateral (
        select o.deployment, o.message_id, o.kind from queue_service.turn_outcomes as o
         where o.deployment = asked.deployment and o.message_id = asked.message_id limit 1
    ) as o
)

-- define: asked_turn
asked as materialized (
    select distinct on (deployment, message_id) *
      from jsonb_to_recordset(%(turns)s::jsonb)
        as asked (deployment text, message_id text, stream text, platform text, channel_id text, user_id text,
                  organization_id text, metadata jsonb, admission interval, execution interval)
     order by deployment, message_id
)

-- define: marker_columns
(deployment, message_id, stream, platform, channel_id, user_id, organization_id, metadata, admission, execution,
        deadline, run_id)

-- define: marker_values
asked.deployment, asked.message_id, asked.stream, asked.platform, asked.channel_id, asked.user_id,
           asked.organization_id, asked.metadata, asked.admission, asked.execution,
           clock_timestamp() + asked.admission

-- define: run_columns
(queue, task, payload, priority, run_at, expires_at, ordering_key, max_attempts, retry_delay, timeout, metadata,
        organization_id)

-- define: run_values
%(queue)s, %(task)s, %(payload)s::jsonb, %(priority)s, due.run_at, due.run_at + %(expires_in)s::interval,
           %(ordering_key)s, %(max_attempts)s, %(retry_delay)s::interval, %(timeout)s::interval, %(metadata)s::jsonb,
           %(organization_id)s

-- define: due
(select coalesce(%(run_at)s::timestamptz,
                           clock_timestamp() + coalesce(%(delay)s::interval, interval '0')) as run_at) as due

-- define: failure_body
jsonb_strip_nulls(jsonb_build_object(
               'code', failure.code,
               'message', coalesce(failure.message, %(sentences)s::jsonb ->> failure.code),
               'reason', failure.reason))

-- define: standing_columns
o.deployment, o.message_id, o.stream, o.armed_at, o.ended_at, o.kind, o.code, o.seq,
       (select events.body::text from queue_service.events
         where events.stream = o.stream and events.seq = o.seq and events.terminal),
       -- The first sign of life may bring the deadline nearer.
       extract(epoch from case when m.admitted_at is null then least(m.deadline, clock_timestamp() + m.execution)
                               else m.deadline end - clock_timestamp())::float8

-- define: is_opened
((asked.deployment, asked.message_id) in (select opened.deployment, opened.message_id from opened)) is true

-- name: arm
-- Owe each of these turns an ending. `turns` is a JSON array of objects. Rows: 'armed', or 'known' for one that was armed
-- before (see `standing` for how it stands). A turn without a row is being armed by another session: send it again.
-- writes: turn_outcomes, turn_markers, streams
with {asked_turns}, armed as (
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
with {asked_turns}, pending as (
    -- Locked, so that of two sessions that dispatch an armed turn, the second finds its run.
    select m.*
      from asked
     cross join lateral (
        select m.deployment, m.message_id from queue_service.turn_markers as m
         where m.deployment = asked.deployment and m.message_id = asked.message_id and m.run_id is null
         limit 1 for update
     ) as m
), stored as (
    insert into queue_service.runs {run_columns}
    select {run_values} from {due} where exists (select from opened) or exists (select from pending)
    returning id
), armed as (
    insert into queue_service.turn_markers {marker_columns}
    select {marker_values}, stored.id from asked cross join stored where {is_opened}
), begun as (
    update queue_service.turn_markers as m
       set run_id = stored.id, deadline = clock_timestamp() + m.admission, admitted_at = null
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
-- and once. A stream that was new or suspended is active then. Row: 'sent' or 'known', the seq of the event and the digest
-- of the message (both null for a turn that was armed by other means); 'ended' where the stream takes no messages. No row:
-- another session is sending it, send it again; and so where this is a not-null violation: the stream was closed after this
-- statement began to look, its head was not moved, and a receipt without a seq takes everything back.
-- writes: turn_outcomes, turn_markers, streams, events, runs, receipts
with {asked_turn}, open_streams as materialized (
    select asked.stream from asked
     where (select s.state from queue_service.streams as s where s.stream = asked.stream limit 1)
           not in ('closing', 'ended') is not false
), opened as (
    insert into queue_service.turn_outcomes (deployment, message_id, stream)
    select deployment, message_id, stream from asked where exists (select from open_streams)
        on conflict (deployment, message_id) do nothing
    returning deployment, message_id
), heads as (
    insert into queue_service.streams (stream, head, state)
    select asked.stream, 1, 'active' from asked where {is_opened}
        on conflict (stream) do update
       set head = streams.head + 1,
           state = case when streams.state in ('created', 'suspended') then 'active' else streams.state end
     where streams.state not in ('closing', 'ended')
    returning stream, head
), said as (
    insert into queue_service.events (stream, seq, kind, body)
    select heads.stream, heads.head, 'message', %(message)s::jsonb from heads
), stored as (
    insert into queue_service.runs {run_columns}
    select {run_values} from {due} where exists (select from opened)
    returning id
), armed as (
    insert into queue_service.turn_markers {marker_columns}
    select {marker_values}, stored.id from asked cross join stored where {is_opened}
), receipt as (
    insert into queue_service.receipts (deployment, message_id, seq, digest)
    select asked.deployment, asked.message_id, (select heads.head from heads), %(digest)s from asked where {is_opened}
    returning seq, digest
)
select 'sent', seq, digest, case when %(notice)s::text is not null then pg_notify(%(channel)s, %(notice)s)::text end,
       case when %(tell)s then pg_notify('queue_service_events', seq || ' ' || %(stream)s::text)::text end
  from receipt
union all
select 'known', r.seq, r.digest, null, null
  from asked
 cross join lateral (
    select true as known from queue_service.turn_outcomes as o
     where o.deployment = asked.deployment and o.message_id = asked.message_id limit 1
 ) as o
  left join lateral (
    select receipts.seq, receipts.digest from queue_service.receipts
     where receipts.deployment = asked.deployment and receipts.message_id = asked.message_id limit 1
 ) as r on true
 where not exists (select from opened)
union all
select 'ended', null, null, null, null from asked
 where not exists (select from open_streams)
   and (select true from queue_service.turn_outcomes as o
         where o.deployment = asked.deployment and o.message_id = asked.message_id limit 1) is null

-- name: end
-- End those of these turns that are still owed an ending, each with the event it was given. `endings` is a JSON array of
-- objects of call, deployment, message_id, kind, code and body; of two for one turn the first counts. Rows: the turns that
-- this ended, with their event. A missing one was ended by somebody else, or never armed, and nothing was stored for it.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with {asked_endings}, taken as (
    delete from queue_service.turn_markers as m
     using asked
     where {is_asked}
    returning {marker_fields}, asked.kind, asked.code, asked.body
), {ended}
{ended_rows}
 order by stream, seq

-- name: end_free
-- As `end`, for several calls at once, waiting for nobody: a call of which another session holds a marker, or writes to a
-- stream, is left alone as a whole, or it would hold up the others. Its turns come back as rows without an event.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with {asked_endings}, owed as materialized (
    select asked.call, m.*
      from asked
     cross join lateral (
        select m.deployment, m.message_id, m.stream from queue_service.turn_markers as m
         where m.deployment = asked.deployment and m.message_id = asked.message_id limit 1
     ) as m
), locked as materialized (
    select m.*
      from asked
     cross join lateral (
        select m.deployment, m.message_id from queue_service.turn_markers as m
         where m.deployment = asked.deployment and m.message_id = asked.message_id limit 1 for update skip locked
     ) as m
), {free_streams}, busy as materialized (
    select owed.call from owed
     where (owed.deployment, owed.message_id) not in (select locked.deployment, locked.message_id from locked)
        or owed.stream not in (select free.stream from free) and owed.stream in (select known.stream from known)
), taken as (
    delete from queue_service.turn_markers as m
     using asked
     where {is_asked}
       and (m.deployment, m.message_id) in (select locked.deployment, locked.message_id from locked)
       and asked.call not in (select busy.call from busy)
    returning {marker_fields}, asked.kind, asked.code, asked.body
), {ended}
{ended_rows}
union all
select owed.deployment, owed.message_id, owed.stream, null, null, null, null, null
  from owed where owed.call in (select busy.call from busy)

-- name: fail_deployment
-- End every turn of a deployment with the same failure. Rows as of `end`.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with failure as materialized (
    select %(code)s::text as code, %(message)s::text as message, %(reason)s::text as reason
), owed as materialized (
    select m.deployment, m.message_id from queue_service.turn_markers as m
     where m.deployment = %(deployment)s
     order by m.deployment, m.message_id
       for update
), taken as (
    delete from queue_service.turn_markers as m
     using failure
     where m.deployment = %(deployment)s and m.message_id = any(array(select owed.message_id from owed))
    returning {marker_fields}, 'error' as kind, failure.code, {failure_body} as body
), {ended}
{ended_rows}
 order by stream, seq

-- name: sweep
-- End turns whose deadline has passed, at most `limit` of them, oldest first. Rows as of `end`. The guard stands in the
-- DELETE: an extend that commits first wins. Markers that another session holds are stepped over, and so are those of
-- streams that somebody is writing to: waiting for one would hold up all the others.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with owed as materialized (
    select m.ctid as place, m.stream from queue_service.turn_markers as m
     where m.deadline < (select clock_timestamp())
     order by m.deadline
     limit %(limit)s
       for update skip locked
), {free_streams}, deleted as (
    -- By its place, which is held. A row that was updated since the snapshot is missed, and swept the next time.
    delete from queue_service.turn_markers as m
     where m.ctid = any(array(
            select owed.place from owed
             where owed.stream in (select free.stream from free) or owed.stream not in (select known.stream from known)))
       and m.deadline < clock_timestamp()
    {lapsed}

-- name: sweep_one
-- As `sweep`, for one turn, and waiting for whoever holds it.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with deleted as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s and m.deadline < clock_timestamp()
    {lapsed}

-- name: discharge
-- Forget what is owed to a turn, without an event: it was answered by other means. Row: its stream.
-- writes: turn_markers, turn_outcomes
with taken as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s
    returning {marker_fields}
)
insert into queue_service.turn_outcomes (deployment, message_id, stream, armed_at, ended_at, kind)
select deployment, message_id, stream, armed_at, clock_timestamp(), 'discharged' from taken
    on conflict (deployment, message_id) do update set ended_at = excluded.ended_at, kind = excluded.kind
 where turn_outcomes.kind is null
returning stream, pg_notify('queue_service_events', '0 ' || stream)::text

-- name: extend
-- A sign of life: the deadline of each turn of the deployment is the execution's from now on, except of those withheld.
-- A withheld one that has had no sign of life yet stops waiting to be taken up: its admission becomes an execution, once.
-- Rows: ids of the messages that were extended.
-- writes: turn_markers
with extended as (
    update queue_service.turn_markers as m
       set deadline = case when m.failure_code is null then clock_timestamp() + m.execution
                           else least(m.deadline, clock_timestamp() + m.execution) end,
           admitted_at = coalesce(m.admitted_at, clock_timestamp())
     where m.deployment = %(deployment)s and m.message_id = any(array(
            select owed.message_id from queue_service.turn_markers as owed
             where owed.deployment = %(deployment)s and (owed.failure_code is null or owed.admitted_at is null)
             order by owed.message_id
               for update))
       and (m.failure_code is null or m.admitted_at is null)
    returning m.message_id, m.failure_code
)
select message_id from extended where failure_code is null

-- name: withhold
-- The provider failed: signs of life no longer extend the turns of the deployment, and if they lapse, they end with this
-- failure. Rows: message ids.
-- writes: turn_markers
update queue_service.turn_markers as m
   set failure_code = %(code)s, failure_reason = %(reason)s
 where m.deployment = %(deployment)s and m.message_id = any(array(
        select owed.message_id from queue_service.turn_markers as owed
         where owed.deployment = %(deployment)s
         order by owed.message_id
           for update))
returning m.message_id

-- name: restore
-- The provider recovered, which is a sign of life. Rows: ids of the messages that had been withheld.
-- writes: turn_markers
update queue_service.turn_markers as m
   set failure_code = null, failure_reason = null, deadline = clock_timestamp() + m.execution,
       admitted_at = coalesce(m.admitted_at, clock_timestamp())
 where m.deployment = %(deployment)s and m.message_id = any(array(
        select owed.message_id from queue_service.turn_markers as owed
         where owed.deployment = %(deployment)s and owed.failure_code is not null
         order by owed.message_id
           for update))
returning m.message_id

-- name: reset_admission
-- The turn waits to be taken up again, with a whole admission before it. Row: its message id.
-- writes: turn_markers
update queue_service.turn_markers as m
   set deadline = clock_timestamp() + m.admission, admitted_at = null
 where m.deployment = %(deployment)s and m.message_id = %(message_id)s
returning m.message_id

-- name: is_live
-- Whether this very turn is owed an ending and still has time.
select exists (
    select from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s and m.deadline > clock_timestamp()
)

-- name: standing
-- How a turn stands: its outcome, or while it is owed one the seconds before which it cannot lapse. No row: never armed.
select {standing_columns}
  from queue_service.turn_outcomes as o
  left join queue_service.turn_markers as m using (deployment, message_id)
 where o.deployment = %(deployment)s and o.message_id = %(message_id)s

-- name: overdue
-- Turns whose deadline has passed, the oldest first.
select m.deployment, m.message_id from queue_service.turn_markers as m
 where m.deadline < (select clock_timestamp())
 order by m.deadline
 limit %(limit)s

-- name: tally
-- How many turns are owed an ending, how many of them are overdue (both counted up to `most`), and for how long the
-- oldest of them has been.
select (select count(*) from (select from queue_service.turn_markers limit %(most)s) as owed),
       (select count(*) from (select from queue_service.turn_markers as m
                               where m.deadline < (select clock_timestamp()) order by m.deadline limit %(most)s) as late),
       (select clock_timestamp() - min(m.deadline) from queue_service.turn_markers as m
         where m.deadline < (select clock_timestamp()))

-- name: page
-- Markers, those first that lapse first, after the place `after_*` says.
select {marker_fields}, m.deadline, m.admitted_at, m.admission, m.execution, m.run_id, m.failure_code,
       m.failure_reason, m.deadline < clock_timestamp()
  from queue_service.turn_markers as m
 where (%(deployment)s::text is null or m.deployment = %(deployment)s)
   and (%(message_id)s::text is null or m.message_id = %(message_id)s)
   and (%(stream)s::text is null or m.stream = %(stream)s)
   and (%(platform)s::text is null or m.platform = %(platform)s)
   and (%(organization_id)s::text is null or m.organization_id = %(organization_id)s)
   and (not %(overdue)s or m.deadline < (select clock_timestamp()))
 order by m.deadline, m.deployment, m.message_id
 limit %(limit)s

-- name: of_run
-- The turn that a run works on, while it is owed its ending: message id and deadline.
select m.deployment, m.message_id, m.deadline from queue_service.turn_markers as m where m.run_id = %(run_id)s

-- name: prune
-- Forget turns that were armed before `age` ago and have ended, at most `limit` of them, their events and their receipts.
-- Row: how many.
-- writes: turn_outcomes, events, receipts
with old as (
    -- By their places: what is deleted here is never updated.
    delete from queue_service.turn_outcomes
     where ctid = any(array(
            select o.ctid from queue_service.turn_outcomes as o
             where o.armed_at < (select clock_timestamp()) - %(age)s::interval and o.kind is not null
             order by o.armed_at limit %(limit)s for update skip locked))
    returning deployment, message_id, stream, seq
), cut as (
    delete from queue_service.events
     where ctid = any(array(
            select e.ctid from old cross join lateral (
                select events.ctid from queue_service.events
                 where events.stream = old.stream and events.seq = old.seq limit 1
            ) as e))
), answered as (
    delete from queue_service.receipts
     where ctid = any(array(
            select r.ctid from old cross join lateral (
                select receipts.ctid from queue_service.receipts
                 where receipts.deployment = old.deployment and receipts.message_id = old.message_id limit 1
            ) as r))
)
select count(*) from old
