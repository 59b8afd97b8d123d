-- What statements of several files share.

-- define: history_columns
-- Of `finished_runs`, in the order in which every ending gives them.
id, run_at, created_at, expires_at, claimed_at, worker_id, attempt, failures, losses, max_attempts, priority, state,
    queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata, result, error,
    attempts

-- define: attempts_and_this
-- The attempts of a run before this one, and this one: its worker, end and error as `this` says. What is no list of attempts
-- is dropped. In JSON a time is one of the session's time zone, if it is not said which.
case when jsonb_typeof(attempts) is distinct from 'array' then '[]'
         when jsonb_array_length(attempts) >= 20 then attempts - 0 else attempts end
    || pg_catalog.jsonb_build_object('attempt', attempt, 'worker_id', this.worker_id,
           'claimed_at', (pg_catalog.to_jsonb(claimed_at at time zone 'UTC') #>> '{}'::text[]) || '+00:00',
           'ended_at', (pg_catalog.to_jsonb(this.ended_at at time zone 'UTC') #>> '{}'::text[]) || '+00:00',
           'error', this.error || jsonb_strip_nulls(pg_catalog.jsonb_build_object(
               'message', left(this.error ->> 'message'::text, 1000),
               'traceback', right(this.error ->> 'traceback'::text, 2000))))

-- define: lock_lanes
-- Locks the lanes of the runs `moved`, in their one order, before the trigger on `runs` comes to them.
locked_lanes as materialized (
    select lane.queue
      from (select distinct moved.queue, moved.ordering_key from moved
             where moved.ordering_key is not null order by moved.queue, moved.ordering_key) as mine
     cross join lateral (
        select lanes.queue from queue_service.lanes
         where lanes.queue = mine.queue and lanes.ordering_key = mine.ordering_key
           for update
     ) as lane
)

-- define: leave_lanes
-- Tells their lanes, once each and in their one order, that the runs `gone` have left them, after their turns have ended. Each
-- statement that deletes runs does it: a trigger would be called for each run.
lanes_left as materialized (
    select queue_service.leave_lanes(pg_catalog.array_agg(lane.queue), pg_catalog.array_agg(lane.ordering_key),
                                     pg_catalog.array_agg(lane.ended))
      from (select gone.queue, gone.ordering_key, count(*) filter (where gone.state = 'running')::integer as ended
              from gone where gone.ordering_key is not null
             group by gone.queue, gone.ordering_key order by gone.queue, gone.ordering_key) as lane
    having count(*) > 0 and (select count(*) from turns_ended) >= 0
)

-- define: end_turns
-- Ends the turns of the runs `over`, which end or are deleted by the same statement: migration 0014. Each statement that
-- deletes runs does it, or turns would be owed an ending by nobody; and before it locks lanes, since whoever sends a message
-- has its stream locked when the trigger comes to the lane.
turns_ended as materialized (
    select queue_service.end_turns(pg_catalog.array_agg(over.id), pg_catalog.array_agg(over.turn),
                                   pg_catalog.array_agg(over.state), pg_catalog.array_agg(over.error))
      from over
    having count(*) > 0
)

-- define: unlocked
-- Which of the runs `mine`, and which of their lanes, no other session has locked.
unlocked as materialized (
    select runs.id from queue_service.runs
     where runs.id = any(array(select mine.id from mine)) and runs.state = 'running'
     order by runs.id
       for update skip locked
), passable as materialized (
    select lane.queue, lane.ordering_key
      from mine
     cross join lateral (
        select lanes.queue, lanes.ordering_key from queue_service.lanes
         where lanes.queue = mine.queue and lanes.ordering_key = mine.ordering_key
           for update skip locked
     ) as lane
)
