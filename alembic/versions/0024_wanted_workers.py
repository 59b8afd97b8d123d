"""How many workers a queue wants, as one number that an autoscaler reads.

A function, since who scales has a connection and a line of SQL, and no Python.

Phase: expand. Lock: none.
"""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

# It counts as the owner of the schema: who scales needs the right to call it, and none to read a payload. Temporary objects
# of the caller come last on its search path.
FUNCTION = """
-- How many workers of so many slots a queue wants: ceil((running + due) / slots), at least 1 while a run is running or due,
-- and at most `most`. Due is what could begin now: not what is for later, expired, behind the running head of its lane, in
-- a paused queue, or beyond the limits of the queue. No more is read than what `most` workers could run at once.
create function queue_service.wanted_workers(queue text, slots integer, most integer default 1000) returns integer
language plpgsql stable security definer set search_path = pg_catalog, pg_temp
set enable_seqscan = off set enable_bitmapscan = off set enable_hashjoin = off set enable_mergejoin = off set jit = off
set plan_cache_mode = force_generic_plan as $$
declare
    moment timestamptz := clock_timestamp();
    all_slots bigint := slots::bigint * most;
    running bigint;
    due bigint := 0;
    -- How many may begin by the limits of the queue. One is looked for all the same: somebody has to be there to begin it.
    may_begin bigint;
    counted bigint;
    is_paused boolean;
    level integer := 32768;
    lane_task text := '';
begin
    if queue is null or slots is null or slots < 1 or most is null or most < 1 then
        raise exception using
              message = 'wanted_workers(' || coalesce(quote_literal(queue), 'null') || ', ' || coalesce(slots::text, 'null')
                        || ', ' || coalesce(most::text, 'null') || ') names no queue, or no number of slots or workers.',
              errcode = 'invalid_parameter_value',
              hint = 'Pass the queue, how many of its runs one worker has going on at once, and the most workers there may '
                     'be: select queue_service.wanted_workers(''default'', 10, 50).';
    end if;
    select count(*) into running
      from (select from queue_service.runs
             where runs.id = any(array(select unnest(leases.run_ids) from queue_service.leases))
               and runs.queue = wanted_workers.queue and runs.state = 'running'
             limit all_slots) as found;
    select queues.paused_at is not null and coalesce(queues.resumes_at, 'infinity') > moment,
           least(queues.max_running - running,
                 floor(least(queues.burst::float8, queues.tokens + extract(epoch from moment - queues.tokens_at)::float8
                                                   * queues.rate::float8 / extract(epoch from queues.period)::float8)))
      into is_paused, may_begin
      from queue_service.queues where queues.name = wanted_workers.queue;
    may_begin := greatest(least(may_begin, all_slots - running), 0);
    while is_paused is not true loop
        select runs.priority into level from queue_service.runs
         where runs.queue = wanted_workers.queue and runs.priority < level and runs.ordering_key is null
         order by runs.queue, runs.priority desc, runs.run_at, runs.id + 0 limit 1;
        exit when level is null;
        select count(*) into counted
          from (select from queue_service.runs
                 where runs.queue = wanted_workers.queue and runs.priority = level and runs.ordering_key is null
                   and runs.run_at <= moment and runs.state = 'queued'
                   and (runs.expires_at is null or runs.expires_at > moment)
                 order by runs.run_at, runs.id + 0 limit greatest(may_begin, 1) - due) as found;
        due := due + counted;
        exit when due >= greatest(may_begin, 1);
    end loop;
    -- A lane is taken at its word: of one that says it is due, one run counts, and of a wide one those of its first runs
    -- that are due. It says it again, or no longer, when a worker has looked at it.
    while is_paused is not true and lane_task is not null and due < greatest(may_begin, 1) loop
        select count(*) into counted
          from (select from (
                    select lanes.queue, lanes.ordering_key, lanes.width - lanes.running as room from queue_service.lanes
                     where lanes.queue = wanted_workers.queue and lanes.task = lane_task and lanes.running < lanes.width
                       and lanes.next_at <= moment
                     order by lanes.queue, lanes.task, lanes.next_at limit greatest(may_begin, 1) - due
                ) as lane
                  left join lateral (
                    select from (
                        select runs.run_at, runs.expires_at from queue_service.runs
                         where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
                         order by runs.queue, runs.ordering_key, runs.id limit lane.room
                    ) as first
                     where first.run_at <= moment and (first.expires_at is null or first.expires_at > moment)
                ) as head on true
                 limit greatest(may_begin, 1) - due) as found;
        due := due + counted;
        select lanes.task into lane_task from queue_service.lanes
         where lanes.queue = wanted_workers.queue and lanes.task > lane_task and lanes.running < lanes.width
         order by lanes.queue, lanes.task, lanes.next_at limit 1;
    end loop;
    return least(greatest(ceil((running + least(due, may_begin))::float8 / slots), (running + due > 0)::integer), most);
end
$$;
revoke all on function queue_service.wanted_workers(text, integer, integer) from public;
"""


def upgrade() -> None:
    op.execute(FUNCTION)


def downgrade() -> None:
    op.execute("drop function queue_service.wanted_workers(text, integer, integer)")
