-- Ending turns. An armed turn is a row of `turn_markers`; deleting it is the election of whoever writes the ending, and the
-- ending is written by the very statement that deletes it.
--
-- Locks are taken in this order: outcomes, markers, streams; those of one kind by ascending key. A statement that ends
-- turns touches their outcomes last all the same: it holds the marker, and nobody else writes the outcome of a turn
-- whose marker is held.

-- define: ended
-- Of the turns `taken`, each with the kind, code and body of its ending: makes `endings`, those that had none yet, each
-- with the seq of its event. Stores the outcome, the event and, for a channel, the run that delivers it.
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
    -- For the API the event is the delivery. Elsewhere a renderer has to deliver it, first of all the one that is connected.
    -- Those of one channel are a lane. Its key begins with the length of the platform's name, since names may hold colons.
    insert into queue_service.runs (queue, task, ordering_key, payload, organization_id, reserved_for)
    select 'thread_response', 'deliver', length(platform) || ':' || platform || ':' || channel_id,
           jsonb_build_object('stream', stream, 'seq', seq, 'kind', kind, 'deployment', deployment,
                              'message_id', message_id, 'platform', platform, 'channel_id', channel_id,
                              'user_id', user_id, 'metadata', metadata),
           organization_id,
           (select owner from queue_service.connections as c
             where c.platform = endings.platform and c.channel_id = endings.channel_id
               and c.expires_at > clock_timestamp())
      from endings where platform <> 'api'
     -- Lanes are locked in this order, and those of one lane come in the order of their events.
     order by length(platform) || ':' || platform || ':' || channel_id, armed_at, message_id
    returning id
)

-- define: ended_rows
select endings.deployment, endings.message_id, endings.stream, endings.seq, endings.kind, endings.platform,
       case when %(notify)s then pg_notify('queue_service_events', endings.seq || ' ' || endings.stream)::text end,
       case when %(notify)s and endings.platform <> 'api' then
           pg_notify('queue_service_runs', '0 thread_response')::text end
  from endings

-- name: end
-- End those of these turns that are still owed an ending, each with the event it was given. `endings` is a JSON array of
-- objects of call, deployment, message_id, kind, code and body; of two for one turn the first counts. Rows: the turns that
-- this ended, with their event. A missing one was ended by somebody else, or never armed, and nothing was stored for it.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with asked as materialized (
    select distinct on (deployment, message_id) *
      from rows from (
        jsonb_to_recordset(%(endings)s::jsonb)
            as (call integer, deployment text, message_id text, kind text, code text, body jsonb)
      ) with ordinality as asked (call, deployment, message_id, kind, code, body, place)
     order by deployment, message_id, place
), taken as (
    delete from queue_service.turn_markers as m
     using asked
     where m.deployment = asked.deployment and m.message_id = asked.message_id
       and m.deployment = any(array(select asked.deployment from asked))
       and m.message_id = any(array(select asked.message_id from asked))
    returning {marker_fields}, asked.kind, asked.code, asked.body
), {ended}
{ended_rows}
 order by stream, seq

-- define: free_streams
-- Of the streams of the turns `owed`: `free` are those that nobody is writing to, `known` those that exist.
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

-- name: end_free
-- As `end`, for several calls at once, waiting for nobody: a call of which another session holds a marker, or writes to a
-- stream, is left alone as a whole, or it would hold up the others. Its turns come back as rows without an event.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with asked as materialized (
    select distinct on (deployment, message_id) *
      from rows from (
        jsonb_to_recordset(%(endings)s::jsonb)
            as (call integer, deployment text, message_id text, kind text, code text, body jsonb)
      ) with ordinality as asked (call, deployment, message_id, kind, code, body, place)
     order by deployment, message_id, place
), owed as materialized (
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
     where m.deployment = asked.deployment and m.message_id = asked.message_id
       and m.deployment = any(array(select asked.deployment from asked))
       and m.message_id = any(array(select asked.message_id from asked))
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
    returning {marker_fields}, 'error' as kind, failure.code,
              jsonb_strip_nulls(jsonb_build_object(
                  'code', failure.code,
                  'message', coalesce(failure.message, %(sentences)s::jsonb ->> failure.code),
                  'reason', failure.reason)) as body
), {ended}
{ended_rows}
 order by stream, seq

-- define: lapsed
-- Makes `taken` of the markers that were `deleted` when their deadline had passed, each with the failure that it was.
taken as materialized (
    select {marker_fields}, 'error' as kind, failure.code,
           jsonb_strip_nulls(jsonb_build_object(
               'code', failure.code,
               'message', coalesce(failure.message, %(sentences)s::jsonb ->> failure.code),
               'reason', failure.reason)) as body
      from deleted as m
     cross join lateral (
        select case when m.failure_code is null then 'worker_unresponsive'
                    when %(sentences)s::jsonb ? m.failure_code then m.failure_code else 'internal_error' end as code,
               null::text as message,
               case when m.failure_code is not null then m.failure_reason
                    when m.admitted_at is null then format('No worker took it up within %%s.', m.admission)
                    else format('No sign of life for %%s.', m.execution) end as reason
    ) as failure
)

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
    returning {marker_fields}, m.failure_code, m.failure_reason, m.admitted_at, m.admission, m.execution
), {lapsed}, {ended}
{ended_rows}
 order by stream, seq

-- name: sweep_one
-- As `sweep`, for one turn, and waiting for whoever holds it.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with deleted as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s and m.deadline < clock_timestamp()
    returning {marker_fields}, m.failure_code, m.failure_reason, m.admitted_at, m.admission, m.execution
), {lapsed}, {ended}
{ended_rows}
 order by stream, seq

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
