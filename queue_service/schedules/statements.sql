-- Every statement about schedules. A schedule fires by one statement that moves its `next_at`, which elects the one who
-- fires, writes its slots, of which each exists once, and stores their runs: all of it or nothing.

-- define: read_columns
schedules.name, schedules.task, schedules.queue, schedules.payload::text, schedules.priority, schedules.expires_in,
       schedules.cron, schedules.every, schedules.timezone, schedules.misfire, schedules.next_at, schedules.paused_at,
       schedules.created_at, schedules.updated_at, last.slot, last.run_id

-- define: last_slot
left join lateral (
    select schedule_slots.slot, schedule_slots.run_id from queue_service.schedule_slots
     where schedule_slots.schedule = schedules.name
     order by schedule_slots.schedule desc, schedule_slots.slot desc limit 1
  ) as last on true

-- name: clock
-- The time of the database.
select clock_timestamp()

-- name: put
-- Store a schedule, or change the one of this name: pauses stay, and so does its next slot where the timing is the same.
-- Row: whether it is new. None: it was like this already, and nothing changed.
-- writes: schedules
insert into queue_service.schedules as kept
       (name, task, queue, payload, priority, expires_in, cron, every, timezone, misfire, next_at)
values (%(name)s, %(task)s, %(queue)s, %(payload)s::jsonb, %(priority)s, %(expires_in)s::interval, %(cron)s,
        %(every)s::interval, %(timezone)s, %(misfire)s, %(next_at)s)
    on conflict (name) do update
   set task = excluded.task, queue = excluded.queue, payload = excluded.payload, priority = excluded.priority,
       expires_in = excluded.expires_in, cron = excluded.cron, every = excluded.every, timezone = excluded.timezone,
       misfire = excluded.misfire, updated_at = clock_timestamp(),
       next_at = case when (kept.cron, kept.every, kept.timezone)
                           is not distinct from (excluded.cron, excluded.every, excluded.timezone)
                      then kept.next_at else excluded.next_at end
 where (kept.task, kept.queue, kept.payload, kept.priority, kept.expires_in, kept.cron, kept.every, kept.timezone, kept.misfire)
       is distinct from
       (excluded.task, excluded.queue, excluded.payload, excluded.priority, excluded.expires_in, excluded.cron,
        excluded.every, excluded.timezone, excluded.misfire)
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
-- The schedule fires again, next at the slot given, unless it was changed since it was read. Row: whether this changed
-- anything.
-- writes: schedules
update queue_service.schedules set paused_at = null, updated_at = clock_timestamp(), next_at = %(next_at)s
 where name = %(name)s and paused_at is not null and updated_at = %(updated_at)s
returning true

-- name: delete
-- Forget a schedule and the slots it has fired for. Row: it was there.
-- writes: schedules, schedule_slots
with gone as (
    delete from queue_service.schedules where name = %(name)s returning name
), forgotten as (
    delete from queue_service.schedule_slots where schedule = any(array(select gone.name from gone))
)
select true from gone

-- name: get
-- One schedule, by its name.
select {read_columns}
  from queue_service.schedules
  {last_slot}
 where schedules.name = %(name)s

-- name: listed
-- The schedules by name.
select {read_columns}
  from queue_service.schedules
  {last_slot}
 order by schedules.name

-- name: run_now
-- Enqueue a schedule's run out of turn: no slot is used, and `next_at` stays. Row: the run's id, queue and priority.
-- None: there is no such schedule.
-- writes: runs
insert into queue_service.runs (queue, task, payload, priority, run_at, expires_at, metadata)
select schedules.queue, schedules.task, schedules.payload, schedules.priority, moment.now,
       moment.now + schedules.expires_in, jsonb_build_object('schedule', schedules.name, 'slot', moment.now)
  from (select clock_timestamp() as now offset 0) as moment
 cross join queue_service.schedules
 where schedules.name = %(name)s
returning id, queue, priority

-- name: due
-- Schedules whose slot has come, those first that waited longest, after one that was seen already. Each row begins with
-- the time, and with the next slot of those that are not due yet; one such row comes even where nothing is due.
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
-- Move due schedules on, and store a run for each of their slots: the election is `next_at`, which must still be what was
-- seen; what somebody else holds is left to them. A slot that was fired for before gives no run. Of each schedule that
-- fires, a few slots that are older than `retention` are forgotten. `firings` is a JSON array. Rows: the schedules that moved,
-- with their runs.
-- writes: schedules, schedule_slots, runs
with asked as materialized (
    select asked.name, asked.seen, asked.updated_at, asked.next_at, asked.slots
      from jsonb_to_recordset(%(firings)s::jsonb)
        as asked (name text, seen timestamptz, updated_at timestamptz, next_at timestamptz, slots timestamptz[])
), picked as materialized (
    select schedules.name, asked.next_at, asked.slots
      from asked
     cross join lateral (
        select schedules.name from queue_service.schedules
         where schedules.name = asked.name and schedules.next_at = asked.seen
           and schedules.updated_at = asked.updated_at and schedules.paused_at is null
           for update skip locked
     ) as schedules
), moved as (
    -- Not joined with what was picked: a plan from when there were no schedules would look at every one of them.
    update queue_service.schedules
       set next_at = (select picked.next_at from picked where picked.name = schedules.name)
     where schedules.name = any(array(select picked.name from picked))
    returning schedules.name, schedules.task, schedules.queue, schedules.payload, schedules.priority, schedules.expires_in
), taken as (
    insert into queue_service.schedule_slots (schedule, slot, run_id)
    select moved.name, fired.slot, nextval('queue_service.runs_id_seq')
      from moved
      join picked on picked.name = moved.name
     cross join unnest(picked.slots) with ordinality as fired (slot, place)
     order by fired.place
        on conflict (schedule, slot) do nothing
    returning schedule, slot, run_id
), forgotten as (
    delete from queue_service.schedule_slots
     where ctid = any(array(
        select old.ctid
          from picked
         cross join lateral (
            select schedule_slots.ctid from queue_service.schedule_slots
             where schedule_slots.schedule = picked.name
               and schedule_slots.slot < (select clock_timestamp()) - %(retention)s::interval
               and schedule_slots.fired_at < (select clock_timestamp()) - %(retention)s::interval
             order by schedule_slots.slot limit 10
         ) as old
     ))
), stored as (
    insert into queue_service.runs (id, queue, task, payload, priority, run_at, expires_at, metadata)
    select taken.run_id, moved.queue, moved.task, moved.payload, moved.priority, moment.now,
           moment.now + moved.expires_in, jsonb_build_object('schedule', moved.name, 'slot', taken.slot)
      from (select clock_timestamp() as now offset 0) as moment
     cross join taken
      join moved on moved.name = taken.schedule
)
select moved.name, moved.queue, moved.priority, taken.slot, taken.run_id
  from moved
  left join taken on taken.schedule = moved.name
