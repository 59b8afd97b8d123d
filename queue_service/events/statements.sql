-- Every statement about streams and their events. The next seq comes from the stream's row. The lock on that row is kept
-- until the commit, so the order of seq is the order of commits, without gaps, and nothing can appear behind a reader.
--
-- CTEs with the same name have the same meaning: `given` are the events that the caller passes, with their places; `heads`
-- are the streams whose head this statement has moved; `numbered` are the events of those, with their seq.

-- An event is of the organization of its stream. A stream that has none is of that of the session, or of a run of its events.

-- name: append
-- Append events, in the order in which they stand in `events`, a JSON array of objects of stream, kind and body. Rows: the
-- place in the array and the seq. An event that is missing belongs to a stream that has ended, and was not stored.
-- writes: streams, events
with given as materialized (
    select given.*, row_number() over (partition by stream order by place) as nth
      from rows from (
        jsonb_to_recordset(%(events)s::jsonb)
            as (stream text, kind text, body jsonb, run_id bigint, attempt integer)
      ) with ordinality as given (stream, kind, body, run_id, attempt, place)
), heads as (
    insert into queue_service.streams (stream, head, organization_id)
    select stream, count(*), coalesce(queue_service.organization(), (
               select runs.organization_id from queue_service.runs where runs.id = max(given.run_id) limit 1))
      from given group by stream order by stream
        on conflict (stream) do update
       set head = streams.head + excluded.head,
           organization_id = coalesce(streams.organization_id, excluded.organization_id)
     where streams.state <> 'ended'
    returning stream, head, organization_id
), numbered as materialized (
    -- Heads are looked up in an object. A join would be a loop within a loop, since the planner expects one row of each.
    select given.*, (ends.heads -> given.stream)::bigint - count(*) over (partition by given.stream) + given.nth as seq,
           ends.owners ->> given.stream as organization_id
      from given
     cross join (select pg_catalog.jsonb_object_agg(stream, head) as heads,
                        pg_catalog.jsonb_object_agg(stream, organization_id) as owners from heads) as ends
     where ends.heads ? given.stream
), stored as (
    -- A recordset turns the null of JSON into that of SQL.
    insert into queue_service.events (stream, seq, kind, body, run_id, attempt, organization_id)
    select stream, seq, kind, coalesce(body, 'null'::jsonb), run_id, attempt, organization_id from numbered
)
select place, seq, case when %(notify)s then pg_notify('queue_service_events', seq::text || ' ' || stream)::text end
  from numbered

-- name: append_free
-- As `append`, but it waits for nobody: events of a stream that another session is writing to come back with seq 0, and
-- were not stored. One such stream would hold up all the others.
-- writes: streams, events
with given as materialized (
    select given.*, row_number() over (partition by stream order by place) as nth
      from rows from (
        jsonb_to_recordset(%(events)s::jsonb)
            as (stream text, kind text, body jsonb, run_id bigint, attempt integer)
      ) with ordinality as given (stream, kind, body, run_id, attempt, place)
), free_streams as materialized (
    select s.stream from queue_service.streams as s
     where s.stream = any(array(select given.stream from given))
     order by s.stream
       for no key update skip locked
), known_streams as materialized (
    select s.stream from queue_service.streams as s where s.stream = any(array(select given.stream from given))
), busy as materialized (
    select given.place, given.stream from given
     where given.stream not in (select free_streams.stream from free_streams)
       and given.stream in (select known_streams.stream from known_streams)
), heads as (
    insert into queue_service.streams (stream, head, organization_id)
    select stream, count(*), coalesce(queue_service.organization(), (
               select runs.organization_id from queue_service.runs where runs.id = max(given.run_id) limit 1))
      from given where stream not in (select busy.stream from busy) group by stream order by stream
        on conflict (stream) do update
       set head = streams.head + excluded.head,
           organization_id = coalesce(streams.organization_id, excluded.organization_id)
     where streams.state <> 'ended'
    returning stream, head, organization_id
), numbered as materialized (
    -- As in `append`.
    select given.*, (ends.heads -> given.stream)::bigint - count(*) over (partition by given.stream) + given.nth as seq,
           ends.owners ->> given.stream as organization_id
      from given
     cross join (select pg_catalog.jsonb_object_agg(stream, head) as heads,
                        pg_catalog.jsonb_object_agg(stream, organization_id) as owners from heads) as ends
     where ends.heads ? given.stream
), stored as (
    insert into queue_service.events (stream, seq, kind, body, run_id, attempt, organization_id)
    select stream, seq, kind, coalesce(body, 'null'::jsonb), run_id, attempt, organization_id from numbered
)
select place, seq, case when %(notify)s then pg_notify('queue_service_events', seq::text || ' ' || stream)::text end
  from numbered
union all
select busy.place, 0, null from busy

-- name: reset
-- An attempt at a turn begins: where the attempts before have left events since the last reset, append one, so that a reader
-- forgets the half answer. Row: its seq; none where there is nothing to forget, or the turn has ended. Of a stream's events
-- the last thousand are looked at.
-- writes: streams, events
with left_over as materialized (
    select latest.kind
      from (select events.kind, events.run_id, events.attempt from queue_service.events
             where events.stream = %(stream)s order by events.seq desc limit 1000) as latest
     where latest.run_id = %(run_id)s and latest.attempt < %(attempt)s
     limit 1
), heads as (
    update queue_service.streams set head = head + 1
     where stream = %(stream)s and state <> 'ended'
       and exists (select from left_over where left_over.kind <> 'reset')
       and exists (select from queue_service.turn_markers as m
                    where m.deployment = %(deployment)s and m.message_id = %(message_id)s)
    returning head, organization_id
)
insert into queue_service.events (stream, seq, kind, body, run_id, attempt, organization_id)
select %(stream)s, heads.head, 'reset', pg_catalog.jsonb_build_object('message_id', %(message_id)s::text), %(run_id)s,
       %(attempt)s, heads.organization_id
  from heads
returning seq, pg_notify('queue_service_events', seq::text || ' ' || stream)::text

-- name: read
-- Events of a stream after a cursor, in order.
select e.stream, e.seq, e.kind, e.terminal, e.created_at, e.body::text, e.attempt
  from queue_service.events as e
 where e.stream = %(stream)s and e.seq > %(after)s
 order by e.seq
 limit %(limit)s

-- define: found
-- The events at the places `chosen` in the stream, in order, as of `read`, and with each how far this has looked (null:
-- there is nothing) and how many events it looked at. One row of these two comes even where nothing was found.
select e.stream, e.seq, e.kind, e.terminal, e.created_at, e.body, e.attempt, walk.place, walk.looked
  from walk
  left join lateral (
    select here.*
      from chosen
     cross join lateral (
        select events.stream, events.seq, events.kind, events.terminal, events.created_at, events.body::text as body,
               events.attempt
          from queue_service.events
         where events.stream = %(stream)s and events.seq = chosen.seq limit 1
     ) as here
  ) as e on true
 order by e.seq

-- name: read_kinds
-- Those of the next `scan_limit` events after a cursor that are of these kinds, at most `limit` of them. Kinds are in no
-- index: what is rare is looked for in one bounded walk after the other.
with looked as materialized (
    select e.seq, e.kind from queue_service.events as e
     where e.stream = %(stream)s and e.seq > %(after)s
     order by e.seq limit %(scan_limit)s
), walk as materialized (
    select max(looked.seq) as place, count(*) as looked from looked
), chosen as materialized (
    select looked.seq from looked where looked.kind = any(%(kinds)s::text[]) order by looked.seq limit %(limit)s
)
{found}

-- name: read_last
-- As `read_kinds`, the last ones of the `scan_limit` events before a cursor. Without kinds, of all.
with looked as materialized (
    select e.seq, e.kind from queue_service.events as e
     where e.stream = %(stream)s and e.seq < %(before)s
     order by e.seq desc limit %(scan_limit)s
), walk as materialized (
    select min(looked.seq) as place, count(*) as looked from looked
), chosen as materialized (
    select looked.seq from looked
     where %(kinds)s::text[] is null or looked.kind = any(%(kinds)s::text[])
     order by looked.seq desc limit %(limit)s
)
{found}

-- name: stream
-- A stream's head, state and time of creation. No row: it does not exist.
select head, state, created_at from queue_service.streams where stream = %(stream)s

-- name: heads
-- Heads and states of those of these streams that exist.
select stream, head, state from queue_service.streams where stream = any(%(streams)s::text[])

-- name: tails
-- What came after a cursor, in each of these streams: at most `limit` events of each, in order. Columns as of `read`.
select e.stream, e.seq, e.kind, e.terminal, e.created_at, e.body::text, e.attempt
  from unnest(%(streams)s::text[], %(cursors)s::bigint[]) as given (stream, cursor)
 cross join lateral (
    select events.* from queue_service.events
     where events.stream = given.stream and events.seq > given.cursor
     order by events.seq limit %(limit)s
 ) as e

-- name: set_state
-- Put a stream into a state, and notify its followers; a stream that does not exist is created. Row: its head.
-- writes: streams
with changed as (
    insert into queue_service.streams (stream, state) values (%(stream)s, %(state)s)
        on conflict (stream) do update set state = excluded.state
    returning stream, head
)
select head, pg_notify('queue_service_events', head::text || ' ' || stream)::text from changed

-- name: suspend
-- Suspend a stream; one that does not exist is created. Row: its head. None: it is closing or has ended, and only its owner
-- may change that (see `set_state`).
-- writes: streams
with changed as (
    insert into queue_service.streams (stream, state) values (%(stream)s, 'suspended')
        on conflict (stream) do update set state = excluded.state
     where streams.state not in ('closing', 'ended')
    returning stream, head
)
select head, pg_notify('queue_service_events', head::text || ' ' || stream)::text from changed

-- name: trim
-- Delete events up to the seq `upto`, at most `limit` of them, but no endings: those are deleted when their turns are
-- pruned. Row: how many were deleted.
-- writes: events
with deleted as (
    -- By their ctids: an event is never updated.
    delete from queue_service.events
     where ctid = any(array(
            select e.ctid from queue_service.events as e
             where e.stream = %(stream)s and e.seq <= %(upto)s and not e.terminal
             order by e.seq limit %(limit)s))
    returning seq
)
select count(*) from deleted

-- name: aged
-- The next `limit` streams after the name `after`, and of each the seq of the last event that is older than `age` (null:
-- there is nothing to delete). Within a stream time follows seq, so the old events are those before the first one that is
-- not old, and no index on time is needed.
select page.stream, case when oldest.seq < coalesce(fresh.seq, page.head + 1) then coalesce(fresh.seq - 1, page.head) end
  from (select s.stream, s.head from queue_service.streams as s
         where s.stream > %(after)s order by s.stream limit %(limit)s) as page
  left join lateral (
    select events.seq from queue_service.events
     where events.stream = page.stream and not events.terminal
     order by events.seq limit 1
  ) as oldest on true
  left join lateral (
    select events.seq from queue_service.events
     where events.stream = page.stream and events.created_at >= (select clock_timestamp()) - %(age)s::interval
     order by events.seq limit 1
  ) as fresh on true
 order by page.stream
