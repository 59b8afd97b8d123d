-- Every statement about streams and their events. The next seq comes from the stream's row, whose lock is kept until
-- the commit: so the order of seq is the order of commits, without gaps, and nothing can appear behind a reader.

-- define: event_columns
e.stream, e.seq, e.kind, e.terminal, e.created_at, e.body::text

-- define: asked_events
asked as materialized (
    select asked.*, row_number() over (partition by stream order by place) as nth
      from rows from (
        jsonb_to_recordset(%(events)s::jsonb) as (stream text, kind text, body jsonb)
      ) with ordinality as asked (stream, kind, body, place)
)

-- define: appended
numbered as materialized (
    -- Heads are looked up in an object: a join would be a loop within a loop, for the planner believes in one row of each.
    select asked.*, (ends.heads -> asked.stream)::bigint - count(*) over (partition by asked.stream) + asked.nth as seq
      from asked cross join (select jsonb_object_agg(stream, head) as heads from heads) as ends
     where ends.heads ? asked.stream
), stored as (
    -- A recordset turns the null of JSON into that of SQL.
    insert into queue_service.events (stream, seq, kind, body)
    select stream, seq, kind, coalesce(body, 'null'::jsonb) from numbered
)

-- define: appended_rows
select place, seq, case when %(tell)s then pg_notify('queue_service_events', seq || ' ' || stream)::text end
  from numbered

-- name: append
-- Append events, in the order they stand in `events`, a JSON array of objects of stream, kind and body. Rows: the place in
-- the array and the seq. A missing one belongs to a stream that has ended, and was not stored.
-- writes: streams, events
with {asked_events}, heads as (
    insert into queue_service.streams (stream, head)
    select stream, count(*) from asked group by stream order by stream
        on conflict (stream) do update set head = streams.head + excluded.head
     where streams.state <> 'ended'
    returning stream, head
), {appended}
{appended_rows}

-- name: append_free
-- As `append`, waiting for nobody: events of a stream that another session is writing to come back with seq 0, and were
-- not stored. One such stream would hold up all the others.
-- writes: streams, events
with {asked_events}, free as materialized (
    select s.stream from queue_service.streams as s
     where s.stream = any(array(select asked.stream from asked))
     order by s.stream
       for no key update skip locked
), known as materialized (
    select s.stream from queue_service.streams as s where s.stream = any(array(select asked.stream from asked))
), busy as materialized (
    select asked.place, asked.stream from asked
     where asked.stream not in (select free.stream from free) and asked.stream in (select known.stream from known)
), heads as (
    insert into queue_service.streams (stream, head)
    select stream, count(*) from asked where stream not in (select busy.stream from busy) group by stream order by stream
        on conflict (stream) do update set head = streams.head + excluded.head
     where streams.state <> 'ended'
    returning stream, head
), {appended}
{appended_rows}
union all
select busy.place, 0, null from busy

-- name: read
-- Events of a stream after a cursor, in order.
select {event_columns}
  from queue_service.events as e
 where e.stream = %(stream)s and e.seq > %(after)s
 order by e.seq
 limit %(limit)s

-- name: stream
-- A stream's head and state. No row: it does not exist.
select head, state, created_at from queue_service.streams where stream = %(stream)s

-- name: heads
-- Heads and states of those of these streams that exist.
select stream, head, state from queue_service.streams where stream = any(%(streams)s::text[])

-- name: tails
-- What came after a cursor, in each of these streams: at most `limit` events of each, in order.
select {event_columns}
  from unnest(%(streams)s::text[], %(cursors)s::bigint[]) as asked (stream, cursor)
 cross join lateral (
    select events.* from queue_service.events
     where events.stream = asked.stream and events.seq > asked.cursor
     order by events.seq limit %(limit)s
 ) as e

-- name: set_state
-- Put a stream into a state; one that does not exist is created. Row: its head.
-- writes: streams
with told as (
    insert into queue_service.streams (stream, state) values (%(stream)s, %(state)s)
        on conflict (stream) do update set state = excluded.state
    returning stream, head
)
select head, pg_notify('queue_service_events', head || ' ' || stream)::text from told

-- name: suspend
-- Put a stream to rest; one that does not exist is created. Row: its head; none where it is closing or has ended, which is
-- for its owner to take back (see `set_state`).
-- writes: streams
with told as (
    insert into queue_service.streams (stream, state) values (%(stream)s, 'suspended')
        on conflict (stream) do update set state = excluded.state
     where streams.state not in ('closing', 'ended')
    returning stream, head
)
select head, pg_notify('queue_service_events', head || ' ' || stream)::text from told

-- name: trim
-- Delete events up to `upto`, at most `limit` of them, but no endings: those go when their turns are pruned.
-- Row: how many.
-- writes: events
with cut as (
    -- By their places: an event is never updated.
    delete from queue_service.events
     where ctid = any(array(
            select e.ctid from queue_service.events as e
             where e.stream = %(stream)s and e.seq <= %(upto)s and not e.terminal
             order by e.seq limit %(limit)s))
    returning seq
)
select count(*) from cut

-- name: aged
-- The next `limit` streams after a name, and of each the last event that is older than `age` (null: there is nothing to
-- delete up to it). Within a stream time follows seq, so what is old lies in front of the first event that is not, and no
-- index on time is needed.
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
