-- Every statement about schedules. One statement fires a schedule: it moves `next_at`, which elects the process that fires;
-- it writes the slots, each of which can exist only once; and it stores their runs. It does all of this, or nothing.

-- name: clock
-- Row: the time of the database.
select clock_timestamp()

-- name: put
-- Store a schedule, or change the one of this name. A pause stays, and so does the next slot where the timing is the same.
-- Row: whether it is new. None: it was like this already, and nothing changed.
-- writes: schedules
insert into queue_service.schedules as kept
       (name, task, queue, payload, priority, expires_in, cron, every, timezone, misfire, next_at, turn)
values (%(name)s, %(task)s, %(queue)s, %(payload)s::jsonb, %(priority)s, %(expires_in)s::interval, %(cron)s,
        %(every)s::interval, %(timezone)s, %(misfire)s, %(next_at)s, %(turn)s::jsonb)
    on conflict (name) do update
   set task = excluded.task, queue = excluded.queue, payload = excluded.payload, priority = excluded.priority,
       expires_in = excluded.expires_in, cron = excluded.cron, every = excluded.every, timezone = excluded.timezone,
       misfire = excluded.misfire, turn = excluded.turn, updated_at = clock_timestamp(),
       next_at = case when (kept.cron, kept.every, kept.timezone)
                           is not distinct from (excluded.cron, excluded.every, excluded.timezone)
                      then kept.next_at else excluded.next_at end
 where (kept.task, kept.queue, kept.payload, kept.priority, kept.expires_in, kept.cron, kept.every, kept.timezone,
        kept.misfire, kept.turn)
       is distinct from
       (excluded.task, excluded.queue, excluded.payload, excluded.priority, excluded.expires_in, excluded.cron,
        excluded.every, excluded.timezone, excluded.misfire, excluded.turn)
returning kept.xmax = 0

-- name: pause
-- The schedule does not fire until it is resumed. Row: whether this changed anything. None: there is no such schedule.
-- writes: schedules
with paused as (
    update queue_service.schedules set paused_at = clock_timestamp(), updated_at = clock_timestamp()
     where name = %(name)s and paused_at is null
    returning name
)
select exists (select from paused) from queue_service.schedules where name = %(name)s

-- name: resume
-- The schedule fires again, next at the slot `next_at`, unless it was changed since it was read. Row: true. None: it was not
-- paused, or it was changed, and this changed nothing.
-- writes: schedules
update queue_service.schedules set paused_at = null, updated_at = clock_timestamp(), next_at = %(next_at)s
 where name = %(name)s and paused_at is not null and updated_at = %(updated_at)s
returning true

-- name: delete
-- Delete a schedule and the slots it has fired for. Row: true. None: there is no such schedule.
-- writes: schedules, schedule_slots
with deleted as (
    delete from queue_service.schedules where name = %(name)s returning name
), deleted_slots as (
    delete from queue_service.schedule_slots where schedule = any(array(select deleted.name from deleted))
)
select true from deleted

-- name: get
-- One schedule, by its name, with the newest slot it has fired for.
select schedules.name, schedules.task, schedules.queue, schedules.payload::text, schedules.priority, schedules.expires_in,
       schedules.cron, schedules.every, schedules.timezone, schedules.misfire, schedules.next_at, schedules.paused_at,
       schedules.created_at, schedules.updated_at, last.slot, last.run_id, schedules.turn::text
  from queue_service.schedules
  left join lateral (
    select schedule_slots.slot, schedule_slots.run_id from queue_service.schedule_slots
     where schedule_slots.schedule = schedules.name
     order by schedule_slots.schedule desc, schedule_slots.slot desc limit 1
  ) as last on true
 where schedules.name = %(name)s

-- name: listed
-- All schedules, by name. Columns as of `get`.
select schedules.name, schedules.task, schedules.queue, schedules.payload::text, schedules.priority, schedules.expires_in,
       schedules.cron, schedules.every, schedules.timezone, schedules.misfire, schedules.next_at, schedules.paused_at,
       schedules.created_at, schedules.updated_at, last.slot, last.run_id, schedules.turn::text
  from queue_service.schedules
  left join lateral (
    select schedule_slots.slot, schedule_slots.run_id from queue_service.schedule_slots
     where schedule_slots.schedule = schedules.name
     order by schedule_slots.schedule desc, schedule_slots.slot desc limit 1
  ) as last on true
 order by schedules.name

-- name: run_now
-- Enqueue a schedule's run now, with its turn: no slot is used, and `next_at` stays. Row: the run's id, queue and priority.
-- None: there is no such schedule.
-- writes: runs, turn_outcomes, turn_markers, streams
with found as materialized (
    select schedules.*, clock_timestamp() as now from queue_service.schedules where schedules.name = %(name)s
), stored as (
    insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, ordering_key, organization_id,
                                    metadata)
    select queue, task, payload, priority, now, now + expires_in, turn ->> 'stream'::text,
           turn ->> 'organization_id'::text, pg_catalog.jsonb_build_object(
               'schedule', name, 'slot', (pg_catalog.to_jsonb(now at time zone 'UTC') #>> '{}'::text[]) || '+00:00')
           || queue_service.turn_of_slot(turn, now)
      from found
    returning id, queue, priority, metadata
), armed as materialized (
    select queue_service.arm_slot(stored.id, stored.metadata, found.turn)
      from stored cross join found where found.turn is not null
)
select id, queue, priority from stored where (select count(*) from armed) >= 0

-- name: due
-- The schedules that are due, the oldest slot first, after the one that was read last (`after`, `after_name`). Each row
-- begins with the time, and with the next slot of those that are not due yet. Where nothing is due, one row says only that.
with moment as materialized (
    select clock_timestamp() as now
), ahead as materialized (
    select (select schedules.next_at from queue_service.schedules
             where schedules.paused_at is null and schedules.next_at > moment.now
             order by schedules.next_at limit 1) as next_at
      from moment
)
select moment.now, ahead.next_at, due.name, due.cron, due.every, due.timezone, due.misfire, due.next_at, due.updated_at
  from moment
 cross join ahead
  left join lateral (
    select schedules.name, schedules.cron, schedules.every, schedules.timezone, schedules.misfire, schedules.next_at,
           schedules.updated_at
      from queue_service.schedules
     where schedules.paused_at is null and schedules.next_at <= moment.now
       and (schedules.next_at, schedules.name) > (%(after)s::timestamptz, %(after_name)s::text)
     order by schedules.next_at, schedules.name
     limit %(limit)s
  ) as due on true

-- name: fire
-- Move due schedules to their next slot, and store a run for each slot that has come. The election is `next_at`, which must
-- still be what the caller has seen; a schedule that another session holds is left to it. A slot that has fired before gives
-- no run. A few slots older than `retention` are deleted of each schedule that fires. `firings` is a JSON array. Rows: the
-- schedules that moved, with their runs. Where a schedule has a turn, one is armed for each slot, for its run to work on.
-- writes: schedules, schedule_slots, runs, turn_outcomes, turn_markers, streams, runs_id_seq
with given as materialized (
    select given.name, given.seen, given.updated_at, given.next_at, given.slots
      from jsonb_to_recordset(%(firings)s::jsonb)
        as given (name text, seen timestamptz, updated_at timestamptz, next_at timestamptz, slots timestamptz[])
), picked as materialized (
    select schedules.name, given.next_at, given.slots
      from given
     cross join lateral (
        select schedules.name from queue_service.schedules
         where schedules.name = given.name and schedules.next_at = given.seen
           and schedules.updated_at = given.updated_at and schedules.paused_at is null
           for update skip locked
     ) as schedules
), moved as (
    -- Not joined with `picked`: a plan from a time when there were no schedules would read every one of them.
    update queue_service.schedules
       set next_at = (select picked.next_at from picked where picked.name = schedules.name)
     where schedules.name = any(array(select picked.name from picked))
    returning schedules.name, schedules.task, schedules.queue, schedules.payload, schedules.priority, schedules.expires_in,
              schedules.turn
), stored_slots as (
    insert into queue_service.schedule_slots (schedule, slot, run_id)
    select moved.name, fired.slot, pg_catalog.nextval('queue_service.runs_id_seq')
      from moved
      join picked on picked.name = moved.name
     cross join pg_catalog.unnest(picked.slots) with ordinality as fired (slot, place)
     order by fired.place
        on conflict (schedule, slot) do nothing
    returning schedule, slot, run_id
), deleted_slots as (
    delete from queue_service.schedule_slots
     where ctid = any(array(
        select old.ctid from picked cross join lateral (
            select schedule_slots.ctid from queue_service.schedule_slots
             where schedule_slots.schedule = picked.name
               and schedule_slots.slot < (select clock_timestamp()) - %(retention)s::interval
               and schedule_slots.fired_at < (select clock_timestamp()) - %(retention)s::interval
             order by schedule_slots.slot limit 10
         ) as old
     ))
), stored as (
    insert into queue_service.runs (id, queue, task, payload, priority, run_at, expires_at, ordering_key, organization_id,
                                    metadata)
    select stored_slots.run_id, moved.queue, moved.task, moved.payload, moved.priority, moment.now,
           moment.now + moved.expires_in, moved.turn ->> 'stream'::text, moved.turn ->> 'organization_id'::text,
           pg_catalog.jsonb_build_object('schedule', moved.name,
               'slot', (pg_catalog.to_jsonb(stored_slots.slot at time zone 'UTC') #>> '{}'::text[]) || '+00:00')
           || queue_service.turn_of_slot(moved.turn, stored_slots.slot)
      from (select clock_timestamp() as now offset 0) as moment
     cross join stored_slots
      join moved on moved.name = stored_slots.schedule
    returning id, metadata
), armed as materialized (
    select queue_service.arm_slot(stored.id, stored.metadata, moved.turn)
      from stored join moved on moved.name = stored.metadata ->> 'schedule'::text and moved.turn is not null
)
select moved.name, moved.queue, moved.priority, stored_slots.slot, stored_slots.run_id
  from moved
  left join stored_slots on stored_slots.schedule = moved.name
 where (select count(*) from armed) >= 0
