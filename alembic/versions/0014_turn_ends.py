"""A run's end is its turn's end. Whichever statement ends a run ends the turn it worked on, by one function, which all the
endings of turns share from now on. A turn may have a bound on the whole of it, and an event says of which attempt it is.

Phase: expand. Lock: `turn_markers` and `events` exclusively for a moment, to add columns without rewriting them.
"""

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

COLUMNS = """
alter table queue_service.turn_markers
    -- When the turn ends at the latest, however many signs of life there are.
    add column ends_by timestamptz,
    add constraint turn_markers_ends_by_check check (ends_by > '1900-01-01Z' and ends_by < '9000-01-01Z');
-- The run that appended it while it worked on a turn of the stream, and its attempt; null where none did.
alter table queue_service.events add column run_id bigint, add column attempt integer;
-- A schedule whose runs work on turns: the turn of each, whose message id ends with the slot, and the deadlines.
alter table queue_service.schedules
    add column turn jsonb,
    add constraint schedules_turn_check check (jsonb_typeof(turn) = 'object');
"""

# As queue_service.turns.model.SENTENCES, which a test holds against this.
SENTENCE = """
create function queue_service.sentence_of(code text) returns text language sql immutable set search_path = '' as $$
select case code
    when 'worker_died' then 'The agent stopped unexpectedly. Please send the message again.'
    when 'worker_unresponsive' then 'The agent stopped responding. Please send the message again.'
    when 'worker_startup_failed' then 'The agent could not be started. Please try again later.'
    when 'provider_quota_exhausted' then 'The model provider''s quota is used up. Please try again later.'
    when 'provider_auth_failed' then 'The model provider refused the agent''s credentials. Please check them.'
    when 'provider_overloaded' then 'The model provider is overloaded. Please try again later.'
    when 'provider_unavailable' then 'The model provider cannot be reached. Please try again later.'
    when 'context_too_large' then 'The conversation is too long for the model. Please start a new one.'
    when 'reply_refused' then 'The agent answered, but its answer could not be stored.'
    when 'no_answer' then 'The agent finished without an answer. Please send the message again.'
    when 'rejected' then 'The message was rejected.'
    when 'cancelled' then 'The turn was cancelled.'
    when 'timeout' then 'The agent took too long to answer. Please send the message again.'
    when 'internal_error' then 'Something went wrong. Please send the message again.'
end
$$;
"""

# The functions tell the planner what our sessions are told (`SESSION` in queue_service/db/pool.py): those of callers end
# turns, too.
ENDINGS = """
-- A turn whose marker was just deleted, and how it ends. Its run, where that may still be queued.
create type queue_service.turn_ending as (
    deployment text, message_id text, stream text, platform text, channel_id text, user_id text, organization_id text,
    metadata jsonb, armed_at timestamptz, run_id bigint, kind text, code text, body jsonb
);

-- End those of these runs `cancelled` that are queued: their turns were answered. It waits for nobody, since the caller
-- has locked markers, which come after runs: what another session holds stays, and finds its turn ended when it runs.
create function queue_service.retire_runs(ids bigint[]) returns void language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    retired bigint[];
begin
    with waiting as materialized (
        select runs.id, runs.queue, runs.ordering_key from queue_service.runs
         where runs.id = any(ids) and runs.state = 'queued' order by runs.id for update skip locked
    ), passable as materialized (
        select waiting.id from waiting where waiting.ordering_key is null
        union all
        select waiting.id
          from waiting
         cross join lateral (
            select from queue_service.lanes
             where lanes.queue = waiting.queue and lanes.ordering_key = waiting.ordering_key for update skip locked
         ) as lane
    ), gone as (
        delete from queue_service.runs where runs.id = any(array(select passable.id from passable)) returning runs.*
    ), lanes_left as materialized (
        select queue_service.leave_lanes(array_agg(lane.queue), array_agg(lane.ordering_key), array_agg(0))
          from (select distinct gone.queue, gone.ordering_key from gone where gone.ordering_key is not null
                 order by gone.queue, gone.ordering_key) as lane
        having count(*) > 0
    ), ended as (
        insert into queue_service.finished_runs (
            id, run_at, created_at, expires_at, claimed_at, worker_id, attempt, failures, losses, max_attempts, priority,
            state, queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout, metadata,
            error, attempts)
        select id, run_at, created_at, expires_at, claimed_at, null, attempt, failures, losses, max_attempts, priority,
               'cancelled', queue, task, payload, singleton_key, ordering_key, organization_id, retry_delay, timeout,
               metadata, jsonb_build_object('reason', 'cancelled', 'message', 'Its turn was answered before it was begun.'),
               attempts
          from gone where (select count(*) from lanes_left) >= 0
        returning id
    )
    select array_agg(ended.id) into retired from ended;
    if retired is not null then
        perform pg_notify('queue_service_finished', case when cardinality(retired) > 300 then '*'
                                                         else array_to_string(retired, ',') end);
    end if;
end
$$;

-- Whether `retire_runs` will find this run free, if it is queued: then it is locked now, and so is its lane. No: another
-- session has one of them.
create function queue_service.may_retire(of_run bigint) returns boolean language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    run record;
begin
    select runs.id, runs.queue, runs.ordering_key into run from queue_service.runs
     where runs.id = of_run and runs.state = 'queued' for update skip locked;
    if run.id is null then
        return not exists (select from queue_service.runs where runs.id = of_run and runs.state = 'queued');
    end if;
    perform from queue_service.lanes
      where lanes.queue = run.queue and lanes.ordering_key = run.ordering_key for update skip locked;
    return found or run.ordering_key is null;
end
$$;

-- Of turns whose markers the caller has just deleted: the outcome, the event and, for a channel, the run that delivers it.
-- Rows: those that had no ending yet. Locks streams in ascending order, then the lanes of deliveries.
create function queue_service.store_endings(given queue_service.turn_ending[], notify boolean)
returns table (deployment text, message_id text, stream text, seq bigint, kind text, platform text)
language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
#variable_conflict use_column
begin
    if cardinality(given) = 0 then
        return;
    end if;
    -- A message that was answered with another one is not to be begun.
    perform queue_service.retire_runs(array(
        select each.run_id from unnest(given) as each
         where each.run_id is not null and each.kind = 'reply' and each.body ? 'together'));
    return query
    with due as materialized (
        -- A turn that has had its ending gets no second one, even if somebody put its marker back by hand.
        select taken.*
          from unnest(given) as taken
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
        -- For the API the event is the delivery. Elsewhere a renderer has to deliver it, first of all the one that is
        -- connected. Those of one channel are a lane. Its key begins with the length of the platform's name, since names
        -- may hold colons.
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
    ), notified as (
        select count(pg_notify('queue_service_events', endings.seq || ' ' || endings.stream)::text),
               count(case when endings.platform <> 'api' then
                         pg_notify('queue_service_runs', '0 thread_response')::text end)
          from endings where notify
    )
    select deployment, message_id, stream, seq, kind, platform from endings
     where (select count(*) from notified) >= 0
     order by stream, seq;
end
$$;

-- Of runs that have ended, or were deleted: ends the turns that they worked on. `turns` are those that their metadata
-- names, `states` how they ended, `errors` as their history has it. A turn that another run works on by now is left alone,
-- and so is one that was answered. Returns how many ended. It looks when the runs are locked, by a look that is younger.
create function queue_service.end_turns(run_ids bigint[], turns jsonb[], states text[], errors jsonb[]) returns bigint
language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    ended queue_service.turn_ending[];
begin
    with over as materialized (
        select over.run_id, over.turn ->> 'deployment' as deployment, over.turn ->> 'message_id' as message_id,
               over.error, case
                   when over.state = 'succeeded' then 'no_answer'
                   when over.state in ('cancelled', 'deleted') then 'cancelled'
                   when over.state = 'expired' or over.error ->> 'reason' = 'timeout' then 'timeout'
                   when over.error ->> 'reason' in ('worker_lost', 'process_died', 'interrupted') then 'worker_died'
                   else 'internal_error' end as code,
               left(case
                   when over.state = 'succeeded'
                        then coalesce(over.error ->> 'message', 'Its run returned without an answer.')
                   when over.state = 'deleted' then 'Its run was deleted.'
                   when over.state = 'expired' then 'Its run was not started in time.'
                   when over.state = 'cancelled' and over.error ->> 'reason' is distinct from 'cancelled'
                        then 'Its run was cancelled.'
                   else concat_ws(': ', over.error ->> 'type', over.error ->> 'message') end, 2000) as reason
          from unnest(run_ids, turns, states, errors) as over (run_id, turn, state, error)
         order by 2, 3
    ), deleted as (
        delete from queue_service.turn_markers as m
         using over
         where m.deployment = over.deployment and m.message_id = over.message_id and m.run_id = over.run_id
           and m.deployment = any(array(select over.deployment from over))
           and m.message_id = any(array(select over.message_id from over))
        returning m.*, over.error ->> 'type' as error_type,
            -- The provider's failure came first, and is what the run died of.
            case when over.code <> 'cancelled' and queue_service.sentence_of(m.failure_code) is not null
                 then m.failure_code else over.code end as code,
            case when over.code <> 'cancelled' and queue_service.sentence_of(m.failure_code) is not null
                 then coalesce(m.failure_reason, over.reason) else over.reason end as reason
    )
    select array_agg(row(deployment, message_id, stream, platform, channel_id, user_id, organization_id, metadata,
                         armed_at, null, 'error', code, jsonb_strip_nulls(jsonb_build_object(
                             'code', code, 'message', queue_service.sentence_of(code), 'reason', reason,
                             'type', error_type)))::queue_service.turn_ending)
      into ended from deleted;
    return (select count(*) from queue_service.store_endings(coalesce(ended, '{}'), true));
end
$$;

-- The metadata of a run that a schedule's `turn` is worked on by, and none where there is no turn.
create function queue_service.turn_of_slot(turn jsonb, slot timestamptz) returns jsonb language sql stable
set search_path = '' as $$
select case when turn is null then '{}' else jsonb_build_object('turn', (turn - '{admission,execution,total}'::text[])
           || jsonb_build_object('message_id', concat_ws(
               '/', turn ->> 'message_id', to_char(slot at time zone 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')))) end
$$;

-- Arm the turn that a run has in its metadata, where it has one, with the deadlines of the schedule.
create function queue_service.arm_slot(of_run bigint, metadata jsonb, deadlines jsonb) returns void
language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    turn jsonb := metadata -> 'turn';
    now timestamptz := clock_timestamp();
    total interval := (deadlines ->> 'total')::interval;
begin
    insert into queue_service.turn_outcomes (deployment, message_id, stream)
    values (turn ->> 'deployment', turn ->> 'message_id', turn ->> 'stream')
        on conflict (deployment, message_id) do nothing;
    if not found then
        return;
    end if;
    insert into queue_service.turn_markers (deployment, message_id, stream, platform, channel_id, user_id, organization_id,
                                            metadata, admission, execution, deadline, ends_by, run_id)
    values (turn ->> 'deployment', turn ->> 'message_id', turn ->> 'stream', turn ->> 'platform', turn ->> 'channel_id',
            turn ->> 'user_id', turn ->> 'organization_id', turn -> 'metadata', (deadlines ->> 'admission')::interval,
            (deadlines ->> 'execution')::interval, now + least((deadlines ->> 'admission')::interval, total), now + total,
            of_run);
    insert into queue_service.streams (stream) values (turn ->> 'stream') on conflict (stream) do nothing;
end
$$;

-- Why a turn had no sign of life when its deadline had passed: what has become of its run.
create function queue_service.why_unanswered(of_run bigint, admission interval) returns text
language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    run record;
    ahead record;
    worker text;
begin
    if of_run is null then
        return format('No worker took it up within %s.', admission);
    end if;
    select * into run from queue_service.runs where id = of_run;
    if run.id is null then
        return format('Its run %s has ended, or was deleted.', of_run);
    end if;
    if run.state = 'running' then
        select workers.name into worker from queue_service.leases, queue_service.workers
         where leases.id = run.lease_id and workers.id = leases.worker_id;
        return format('Worker %s took it up at %s, and its handler gave no sign of life.', coalesce(worker, '?'),
                      run.claimed_at);
    end if;
    if run.failures > 0 or run.losses > 0 then
        return left(format('Its last attempt failed (%s), and it is to be tried again at %s.',
                           concat_ws(': ', run.error ->> 'type', run.error ->> 'message'), run.run_at), 2000);
    end if;
    if run.run_at > clock_timestamp() then
        return format('It is to begin at %s.', run.run_at);
    end if;
    if exists (select from queue_service.queues where name = run.queue and paused_at is not null
                      and coalesce(resumes_at, 'infinity') > clock_timestamp()) then
        return format('Its queue %s is paused.', run.queue);
    end if;
    if run.ordering_key is not null then
        select * into ahead from queue_service.runs
         where runs.queue = run.queue and runs.ordering_key = run.ordering_key and runs.id < of_run
         order by runs.queue, runs.ordering_key, runs.id limit 1;
        if ahead.id is not null then
            return format('It waits behind run %s, which is %s.', ahead.id, ahead.state)
                   || coalesce(format(' That one answers message %s.', ahead.metadata -> 'turn' ->> 'message_id'), '');
        end if;
    end if;
    return format('No worker took it up within %s.', admission);
end
$$;
"""


def upgrade() -> None:
    op.execute(COLUMNS)
    op.execute(SENTENCE)
    op.execute(ENDINGS)


def downgrade() -> None:
    op.execute("drop function queue_service.arm_slot(bigint, jsonb, jsonb)")
    op.execute("drop function queue_service.turn_of_slot(jsonb, timestamptz)")
    op.execute("alter table queue_service.schedules drop column turn")
    op.execute("drop function queue_service.why_unanswered(bigint, interval)")
    op.execute("drop function queue_service.end_turns(bigint[], jsonb[], text[], jsonb[])")
    op.execute("drop function queue_service.store_endings(queue_service.turn_ending[], boolean)")
    op.execute("drop function queue_service.sentence_of(text)")
    op.execute("drop function queue_service.may_retire(bigint)")
    op.execute("drop function queue_service.retire_runs(bigint[])")
    op.execute("drop type queue_service.turn_ending")
    op.execute("alter table queue_service.turn_markers drop column ends_by")
    op.execute("alter table queue_service.events drop column run_id, drop column attempt")
