-- How turns stand, one or many, and forgetting those that ended long ago.

-- name: is_live
-- Whether this very turn is owed an ending and still has time.
select exists (
    select from queue_service.turn_markers as m
     where m.deployment = %(deployment)s and m.message_id = %(message_id)s and m.deadline > clock_timestamp()
)

-- name: message_seq
-- Where the message of a turn stands in its stream. No row: it was armed by other means.
select r.seq from queue_service.receipts as r where r.deployment = %(deployment)s and r.message_id = %(message_id)s

-- name: waits
-- Whether a turn is owed an ending, and its run is queued.
select coalesce((select runs.state from queue_service.turn_markers as m, queue_service.runs
                  where m.deployment = %(deployment)s and m.message_id = %(message_id)s and runs.id = m.run_id) = 'queued',
                false)

-- name: standing
-- How a turn stands: its outcome, or while it is owed one the seconds before which it cannot lapse. No row: never armed.
select o.deployment, o.message_id, o.stream, o.armed_at, o.ended_at, o.kind, o.code, o.seq,
       (select events.body::text from queue_service.events
         where events.stream = o.stream and events.seq = o.seq and events.terminal),
       -- The first sign of life may bring the deadline nearer.
       extract(epoch from case when m.admitted_at is null then least(m.deadline, clock_timestamp() + m.execution)
                               else m.deadline end - clock_timestamp())::float8
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

-- name: oldest_overdue
-- For how long the oldest of the turns that are overdue has been. Row: null where none is.
select clock_timestamp() - min(m.deadline) from queue_service.turn_markers as m
 where m.deadline < (select clock_timestamp())

-- name: page
-- Markers, those first that lapse first, after the place `after_*` says.
select m.deployment, m.message_id, m.stream, m.platform, m.channel_id, m.user_id, m.organization_id, m.metadata::text,
       m.armed_at, m.deadline, m.admitted_at, m.admission, m.execution, m.run_id, m.failure_code,
       m.failure_reason, m.ends_by, m.deadline < clock_timestamp()
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
-- Forget turns that were armed before `age` ago and have ended, at most `limit` of them, with their events, their receipts
-- and the ids under which platforms showed them. Row: how many.
-- writes: turn_outcomes, events, receipts, renderings
with old as (
    -- By their places: what is deleted here is not updated any more.
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
), rendered as (
    delete from queue_service.renderings
     where ctid = any(array(
            select r.ctid from old cross join lateral (
                select renderings.ctid from queue_service.renderings
                 where renderings.deployment = old.deployment and renderings.message_id = old.message_id limit 1
            ) as r))
)
select count(*) from old
