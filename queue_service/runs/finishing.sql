-- What becomes of claimed runs, and of each write whether its claim was still held: `attempt` has moved if it was not.
-- Locks are taken leases first, then runs by ascending id, then those of their turns, then lanes by queue and key.
--
-- The columns of a run that is running or has ended describe its last attempt. Those before it that failed or lost their
-- worker are in `attempts`, the last twenty, their errors shortened; null where there were none, which costs nothing.

-- define: is_held
-- `ids` ascend, so width_bucket finds the place of a run's attempt by bisection.
runs.id = any(%(ids)s::bigint[])
       and runs.attempt = (%(attempts)s::integer[])[pg_catalog.width_bucket(runs.id, %(ids)s::bigint[])]
       and runs.state = 'running'

-- define: outcome
-- Of a run, as it stands at the place of its id.
(select %(outcomes)s::jsonb) -> (pg_catalog.width_bucket(runs.id, %(ids)s::bigint[]) - 1)

-- name: finish
-- End claimed runs: out of `runs`, into history, and let go of leases that hold nothing more. One row for each claim
-- that was still held; a claim that is missing was lost, and nothing about its run changed.
-- An outcome is an object of state, result and error, or null for plain success. The leases are freed first (their count
-- makes it so): a sweep locks in that order, and the two would deadlock.
-- writes: runs, finished_runs, leases, turn_markers, turn_outcomes, streams, events, lanes
with freed as (
    delete from queue_service.leases where id = any(%(leases)s::bigint[]) returning id
), taken as (
    delete from queue_service.runs
     where {is_held} and (select count(*) from freed) >= 0
    returning runs.*, (select %(outcomes)s::jsonb) -> (pg_catalog.width_bucket(runs.id, %(ids)s::bigint[]) - 1) as outcome
), gone as materialized (
    -- Those of which more is to be told than their history: to look at each of them twice would cost a drain 3 %.
    select id, queue, ordering_key, state, metadata, outcome from taken where ordering_key is not null or metadata is not null
), over as materialized (
    select id, metadata -> 'turn'::text as turn, coalesce(outcome ->> 'state'::text, 'succeeded') as state,
           outcome -> 'error'::text as error
      from gone where metadata ? 'turn'::text
), {end_turns}, {leave_lanes}
insert into queue_service.finished_runs ({history_columns})
select id, run_at, created_at, expires_at, claimed_at, %(worker_id)s, attempt,
       least(failures, 2147483646) + (outcome ->> 'state'::text is not distinct from 'failed')::integer, losses,
       max_attempts, priority, coalesce(outcome ->> 'state'::text, 'succeeded'), queue, task, payload, singleton_key,
       ordering_key, organization_id, retry_delay, timeout, metadata, outcome -> 'result'::text,
       coalesce(outcome -> 'error'::text, error), attempts
  from taken
 where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
returning id, attempt

-- name: hand_on
-- As `finish`, of runs that succeeded and have handed their turns on. `heirs` are the runs that answer from now on, null
-- where the deployment of the turn does; either has a whole admission to take it up. A turn that was handed on to a run which has
-- ended ends. The heirs are changed before lanes are locked, since whoever ends one takes the same order; their row's lock
-- decides who is first, and the end of an heir finds the turn in its metadata.
-- writes: runs, finished_runs, leases, turn_markers, turn_outcomes, streams, events, lanes
with freed as (
    delete from queue_service.leases where id = any(%(leases)s::bigint[]) returning id
), taken as (
    delete from queue_service.runs
     where {is_held} and (select count(*) from freed) >= 0
    returning runs.*, {outcome} as outcome,
        -- No array: where array_nulls is off, it could hold no null.
        ((select %(heirs)s::jsonb) ->> (pg_catalog.width_bucket(runs.id, %(ids)s::bigint[]) - 1))::bigint as heir
), inherited as (
    update queue_service.runs
       set metadata = case when jsonb_typeof(metadata) = 'object' then metadata else '{}' end || (
            select pg_catalog.jsonb_build_object('turn', taken.metadata -> 'turn'::text)
              from taken where taken.heir = runs.id limit 1)
     where id = any(array(select taken.heir from taken where taken.metadata ? 'turn'::text))
    returning id
), gone as materialized (
    select taken.*, heir is null or heir in (select inherited.id from inherited) as is_passed_on from taken
     where (select count(*) from inherited) >= 0
), over as materialized (
    select id, metadata -> 'turn'::text as turn, 'succeeded' as state, pg_catalog.jsonb_build_object(
               'message', pg_catalog.format('It was handed on to run %%s, which has ended or never was.', heir)) as error
      from gone where metadata ? 'turn'::text and not is_passed_on
), {end_turns}, {leave_lanes}, passed_on as (
    update queue_service.turn_markers as m
       set run_id = gone.heir, deadline = least(clock_timestamp() + m.admission, m.ends_by), admitted_at = null
      from gone
     where m.deployment = gone.metadata -> 'turn'::text ->> 'deployment'::text
       and m.message_id = gone.metadata -> 'turn'::text ->> 'message_id'::text and m.run_id = gone.id and gone.is_passed_on
)
insert into queue_service.finished_runs ({history_columns})
select id, run_at, created_at, expires_at, claimed_at, %(worker_id)s, attempt, failures, losses, max_attempts, priority,
       'succeeded', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata,
       outcome -> 'result'::text, error, attempts
  from gone
 where (select count(*) from lanes_left) >= 0 and (select count(*) from turns_ended) >= 0
returning id, attempt

-- name: give_back
-- Return claimed runs to their queue: after a delay, or to their old place where there is none. One asked to be
-- cancelled meanwhile ends so instead. One row for each claim that was still held. An outcome is an object of delay (in
-- seconds), failed, error and reserved_for; without the last, the run is anyone's. The runs are locked before
-- cancel_requested is looked at: a request that came in between would otherwise fit neither branch. The owner of a
-- reserved run is notified with the commit: it has a second, and a poll may come later (counting `notified` makes it
-- happen).
-- writes: runs, finished_runs, leases, turn_markers, turn_outcomes, streams, events, lanes
with freed as (
    delete from queue_service.leases where id = any(%(leases)s::bigint[]) returning id
), held as materialized (
    select runs.id, runs.queue, runs.ordering_key, runs.cancel_requested, runs.metadata -> 'turn'::text as turn
      from queue_service.runs
     where {is_held} and (select count(*) from freed) >= 0
     order by runs.id
       for update
), over as materialized (
    select id, turn, 'cancelled' as state, null::jsonb as error from held where cancel_requested and turn is not null
), {end_turns}, moved as materialized (
    select * from held where (select count(*) from turns_ended) >= 0
), {lock_lanes}, gone as (
    delete from queue_service.runs
     where runs.id = any(array(select moved.id from moved where moved.cancel_requested))
       and (select count(*) from locked_lanes) >= 0
    returning runs.*, {outcome} as outcome
), {leave_lanes}, cancelled as (
    insert into queue_service.finished_runs ({history_columns})
    select id, run_at, created_at, expires_at, claimed_at, %(worker_id)s, attempt,
           least(failures, 2147483646) + coalesce((outcome ->> 'failed'::text)::boolean, false)::integer, losses,
           max_attempts, priority, 'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id,
           retry_delay, timeout, metadata, null, coalesce(outcome -> 'error'::text, pg_catalog.jsonb_build_object(
               'reason', 'cancelled', 'message', 'It was cancelled while it ran.')), attempts
      from gone
    returning id, attempt
), queued as (
    update queue_service.runs
       set state = 'queued', lease_id = null, claimed_at = null,
           failures = least(failures, 2147483646) + coalesce(({outcome} ->> 'failed'::text)::boolean, false)::integer,
           run_at = coalesce(
               clock_timestamp() + pg_catalog.make_interval(secs => ({outcome} ->> 'delay'::text)::float8), run_at),
           error = coalesce({outcome} -> 'error'::text, error), reserved_for = {outcome} ->> 'reserved_for'::text,
           progress = null,
           attempts = case when ({outcome} -> 'failed'::text)::boolean then (
               select {attempts_and_this}
                 from (select %(worker_id)s::bigint as worker_id, clock_timestamp() as ended_at,
                              {outcome} -> 'error'::text as error) as this) else attempts end
     where runs.id = any(array(select moved.id from moved where not moved.cancel_requested))
    returning id, attempt, queue, priority, reserved_for
), notified as (
    select pg_notify('queue_service_runs', priority::text || ' ' || queue)::text from queued where reserved_for is not null
)
select id, attempt from queued
 where (select count(*) from notified) >= 0 and (select count(*) from locked_lanes) >= 0
union all
select id, attempt from cancelled where (select count(*) from lanes_left) >= 0

-- name: busy
-- Of these claims, those that are held, but whose run or lane another session has locked: their endings would wait for it.
-- Rows: the claims.
with mine as materialized (
    select runs.id, runs.attempt, runs.queue, runs.ordering_key from queue_service.runs where {is_held}
), {unlocked}
select mine.id, mine.attempt from mine
 where mine.id not in (select unlocked.id from unlocked)
    or mine.ordering_key is not null
       and (mine.queue, mine.ordering_key) not in (select passable.queue, passable.ordering_key from passable)

-- name: report
-- Store how far claimed runs are: of each an object of value and note. Rows: the claims of which it was stored. A run that
-- another session has locked, as its handler's own transaction may for long, is passed over: no other waits for it here.
-- writes: runs
with unlocked as materialized (
    select runs.id from queue_service.runs
     where {is_held}
     order by runs.id
       for update skip locked
)
update queue_service.runs
   set progress = ((select %(reports)s::jsonb) -> (pg_catalog.width_bucket(runs.id, %(ids)s::bigint[]) - 1))
                  || pg_catalog.jsonb_build_object(
                      'at', (pg_catalog.to_jsonb(clock_timestamp() at time zone 'UTC') #>> '{}'::text[]) || '+00:00')
 where runs.id = any(array(select unlocked.id from unlocked))
returning runs.id, runs.attempt

-- name: hold
-- Keep everyone else from a run until the caller's transaction ends. Row: its id, if the claim is still held.
select id from queue_service.runs
 where id = %(run_id)s and attempt = %(attempt)s and state = 'running'
   for update

-- name: plan_as_ours
-- In a session that is not ours: for the rest of its transaction, what our statements need of the planner.
select set_config('enable_seqscan', 'off', true), set_config('enable_bitmapscan', 'off', true),
       set_config('enable_mergejoin', 'off', true)
