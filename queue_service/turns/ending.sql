-- Ending turns. An armed turn is a row of `turn_markers`; deleting it is the election of whoever writes the ending, and the
-- ending is written by the very statement that deletes it.
--
-- Locks are taken in this order: leases, runs, outcomes, markers, streams, lanes; those of one kind by ascending key, and the
-- lanes of deliveries before others, since an ending stores them as it goes. What is stored in a lane locks it when its
-- statement is over, which is when triggers fire. A statement that ends turns touches their outcomes last all the same: it holds the marker, and
-- nobody else writes the outcome of a turn whose marker is held. The run of a turn that is answered together with
-- others ends with it, if it is queued: a message that was consumed by the answer to another is not begun.

-- define: endings
-- Of the turns `taken`, each with the kind, code and body of its ending: stores the endings of those that had none yet
-- (`store_endings`, migration 0014, which the ends of runs call too).
endings as materialized (
    select e.* from queue_service.store_endings(array(
        select row(deployment, message_id, stream, platform, channel_id, user_id, organization_id, metadata, armed_at,
                   run_id, kind, code, body)::queue_service.turn_ending
          from taken), %(notify)s) as e
)

-- define: ended_rows
select endings.deployment, endings.message_id, endings.stream, endings.seq, endings.kind, endings.platform from endings

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
), {endings}
{ended_rows}

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
-- As `end`, for several calls at once, waiting for nobody: a call of which another session holds a marker or a queued run, or
-- writes to a stream, is left alone as a whole, or it would hold up the others. Its turns come back as rows without an event.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with asked as materialized (
    select distinct on (deployment, message_id) *
      from rows from (
        jsonb_to_recordset(%(endings)s::jsonb)
            as (call integer, deployment text, message_id text, kind text, code text, body jsonb)
      ) with ordinality as asked (call, deployment, message_id, kind, code, body, place)
     order by deployment, message_id, place
), owed as materialized (
    select asked.call, asked.kind = 'reply' and asked.body ? 'together'::text as is_together, m.*
      from asked
     cross join lateral (
        select m.deployment, m.message_id, m.stream, m.run_id from queue_service.turn_markers as m
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
    union all
    select owed.call from owed
     where owed.run_id is not null and owed.is_together and not queue_service.may_retire(owed.run_id)
), taken as (
    delete from queue_service.turn_markers as m
     using asked
     where m.deployment = asked.deployment and m.message_id = asked.message_id
       and m.deployment = any(array(select asked.deployment from asked))
       and m.message_id = any(array(select asked.message_id from asked))
       and (m.deployment, m.message_id) in (select locked.deployment, locked.message_id from locked)
       and asked.call not in (select busy.call from busy)
    returning {marker_fields}, asked.kind, asked.code, asked.body
), {endings}
{ended_rows}
union all
select owed.deployment, owed.message_id, owed.stream, null, null, null
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
              jsonb_strip_nulls(pg_catalog.jsonb_build_object(
                  'code', failure.code,
                  'message', coalesce(failure.message, queue_service.sentence_of(failure.code)),
                  'reason', failure.reason)) as body
), {endings}
{ended_rows}

-- define: lapsed
-- Makes `taken` of the markers that were `deleted` when their deadline had passed, each with the failure that it was.
taken as materialized (
    select {marker_fields}, 'error' as kind, failure.code,
           jsonb_strip_nulls(pg_catalog.jsonb_build_object(
               'code', failure.code, 'message', queue_service.sentence_of(failure.code), 'reason', failure.reason)) as body
      from deleted as m
     cross join lateral (
        select case when m.failure_code is null and m.ends_by < clock_timestamp() then 'timeout'
                    when m.failure_code is null then 'worker_unresponsive'
                    when queue_service.sentence_of(m.failure_code) is not null then m.failure_code
                    else 'internal_error' end as code,
               case when m.failure_code is not null then m.failure_reason
                    when m.ends_by < clock_timestamp()
                         then pg_catalog.format('It was not answered within %%s as a whole.', in_words.total)
                    when m.admitted_at is null then queue_service.why_unanswered(m.run_id, m.admission)
                    else pg_catalog.format('No sign of life for %%s.', in_words.execution) end as reason
          from (
            -- An interval as text would follow the session's IntervalStyle.
            select rtrim(rtrim(to_char(pg_catalog.make_interval(secs => extract(epoch from m.ends_by - m.armed_at)::float8),
                                       'HH24:MI:SS.US'), '0'), '.') as total,
                   rtrim(rtrim(to_char(pg_catalog.make_interval(secs => extract(epoch from m.execution)::float8),
                                       'HH24:MI:SS.US'), '0'), '.') as execution
          ) as in_words
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
    returning {marker_fields}, m.failure_code, m.failure_reason, m.admitted_at, m.admission, m.execution,
              m.ends_by
), {lapsed}, {endings}
{ended_rows}

-- name: sweep_one
-- As `sweep`, for one turn, and waiting for whoever holds it.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with deleted as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s and m.deadline < clock_timestamp()
    returning {marker_fields}, m.failure_code, m.failure_reason, m.admitted_at, m.admission, m.execution,
              m.ends_by
), {lapsed}, {endings}
{ended_rows}

-- name: interrupt
-- End the turns of a message's stream that came before it and are being worked on, `cancelled`, and mark their runs for
-- their workers. Rows as of `end`, and the run. A run is locked before its turn, as by whatever ends it: one that ends at this
-- moment ends its turn by itself.
-- writes: turn_markers, turn_outcomes, streams, events, runs
with mine as materialized (
    select m.stream, m.armed_at from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s
), before as materialized (
    select m.message_id, m.run_id from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id <> %(message_id)s
       and m.stream = (select mine.stream from mine) and m.armed_at < (select mine.armed_at from mine)
), marked as (
    update queue_service.runs set cancel_requested = true
     where id = any(array(select before.run_id from before)) and state = 'running'
    returning id
), begun as materialized (
    select m.message_id, m.run_id from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = any(array(select before.message_id from before))
       and (m.run_id is null or m.run_id = any(array(select marked.id from marked)))
     order by m.message_id
       for update
), taken as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = any(array(select begun.message_id from begun))
    returning {marker_fields}, 'error' as kind, 'cancelled' as code, pg_catalog.jsonb_build_object(
        'code', 'cancelled', 'message', queue_service.sentence_of('cancelled'),
        'reason', 'Another message interrupted it.') as body
), {endings}
select endings.deployment, endings.message_id, endings.stream, endings.seq, endings.kind, endings.platform,
       (select begun.run_id from begun where begun.message_id = endings.message_id)
  from endings

-- name: discharge
-- Forget what is owed to a turn, without an event: it was answered by other means. Row: its stream.
-- writes: turn_markers, turn_outcomes
with taken as (
    delete from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s
    returning {marker_fields}
)
insert into queue_service.turn_outcomes (deployment, message_id, stream, armed_at, ended_at, kind, organization_id)
select deployment, message_id, stream, armed_at, clock_timestamp(), 'discharged', organization_id from taken
    on conflict (deployment, message_id) do update set ended_at = excluded.ended_at, kind = excluded.kind
 where turn_outcomes.kind is null
returning stream, pg_notify('queue_service_events', '0 ' || stream)::text
