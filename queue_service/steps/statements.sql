-- Every statement about steps: named parts of runs, whose results are stored so that a later attempt does not repeat them.

-- name: store
-- Store steps of runs, each if its claim is held. Rows: run id, attempt and name of those that are stored now (true), and of
-- those whose run another session has locked (false): these are to be sent again. One that is missing was lost, or another
-- attempt has stored it. One that the same attempt has stored before stays as it is.
-- The lock on the run keeps a sweep, an ending and a return waiting until the step is committed: whoever claims the run
-- next finds it. No other session is waited for, or its lock would hold up the steps of other runs.
-- writes: steps
with asked as materialized (
    select step.run_id, step.attempt, step.name, coalesce(step.result, 'null') as result
      from json_to_recordset(%(steps)s::json) as step (run_id bigint, attempt integer, name text, result jsonb)
), claims as materialized (
    select distinct asked.run_id, asked.attempt from asked
), held as materialized (
    select claims.run_id, claims.attempt
      from claims
     cross join lateral (
        select from queue_service.runs
         where runs.id = claims.run_id and runs.attempt = claims.attempt and runs.state = 'running'
           for share skip locked
     ) as run
), stored as (
    insert into queue_service.steps as step (run_id, name, attempt, result)
    select asked.run_id, asked.name, asked.attempt, asked.result
      from asked
     where (asked.run_id, asked.attempt) in (select held.run_id, held.attempt from held)
        on conflict (run_id, name) do update set attempt = step.attempt
     where step.attempt = excluded.attempt
    returning run_id, attempt, name
)
select stored.run_id, stored.attempt, stored.name, true from stored
union all
select asked.run_id, asked.attempt, asked.name, false
  from asked
 where (asked.run_id, asked.attempt) not in (select held.run_id, held.attempt from held)
   and (select runs.attempt from queue_service.runs
         where runs.id = asked.run_id and runs.state = 'running') = asked.attempt

-- name: of_run
-- The steps of a run, in no order: asked for it, Postgres might walk along the index by time. Rows: name, attempt, time and
-- result.
select name, attempt, created_at, result::text from queue_service.steps where run_id = %(run_id)s

-- name: is_stored
-- A row if this attempt of a run has stored this step.
select run_id from queue_service.steps
 where run_id = %(run_id)s and name = %(name)s and attempt = %(attempt)s

-- name: forget
-- Forget the steps of a run that was deleted.
-- writes: steps
delete from queue_service.steps where run_id = %(run_id)s

-- name: prune
-- Of the next `scan_limit` steps that were stored before `age` ago, by time, forget those of runs that are neither live nor
-- in history. Row: how many went, and the time and run where to go on (null: nothing is left to be looked at). Steps of one
-- run that were stored in the same microsecond may be passed over between two batches; the next pass finds them.
-- writes: steps
with old as materialized (
    select steps.ctid as place, steps.created_at, steps.run_id from queue_service.steps
     where (steps.created_at, steps.run_id + 0) > (coalesce(%(after)s::timestamptz, '-infinity'), %(after_run)s)
       and steps.created_at < (select clock_timestamp()) - %(age)s::interval
     order by steps.created_at, steps.run_id + 0 limit %(scan_limit)s
), gone as materialized (
    select owner.run_id
      from (select distinct old.run_id from old) as owner
      left join lateral (
        select true as found from queue_service.runs where runs.id = owner.run_id limit 1
      ) as live on true
      left join lateral (
        select true as found from queue_service.finished_runs where finished_runs.id = owner.run_id limit 1
      ) as ended on true
     where live.found is null and ended.found is null
), forgotten as (
    delete from queue_service.steps
     where steps.ctid = any(array(select old.place from old where old.run_id in (select gone.run_id from gone)))
    returning run_id
)
select (select count(*) from forgotten), pg_catalog.to_jsonb(max(old.created_at)) #>> '{}'::text[],
       (select last.run_id from old as last order by last.created_at desc, last.run_id desc limit 1)
  from old
