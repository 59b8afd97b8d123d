"""A lane knows for whom its head is reserved, and a turn under which id a platform shows it.

A head that is reserved for one process, for a second, was found by the claims of the others, which could not take it; they
put the lane off for a second, and so for its owner, too. Now the lane says whose it is, and the others do not look at it
for that second. `renderings` has a row for each turn that a renderer gave an id of its platform's.

Phase: expand. Lock: `lanes` exclusively, for a moment.
"""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

RENDERINGS = """
create table queue_service.renderings (
    deployment          text not null,
    message_id          text not null,
    platform_message_id text not null,
    updated_at          timestamptz not null default clock_timestamp(),
    constraint renderings_pkey primary key (deployment, message_id)
) with (
    -- A turn that goes on is shown again and again under one id.
    fillfactor = 80,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.05
)
"""

FUNCTIONS = """
-- The lane of a run that was stored. Its row is locked until the end of the transaction, and changed only where there is
-- something to say: of an enqueue and the end of the last run, whichever comes second sees the other.
create or replace function queue_service.join_lane() returns trigger language plpgsql set search_path = '' as $$
begin
    insert into queue_service.lanes as lane (queue, ordering_key, next_at, width, task, reserved_for)
    values (new.queue, new.ordering_key, new.run_at,
            coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1), new.task,
            new.reserved_for)
        on conflict (queue, ordering_key) do update
       set next_at = least(lane.next_at, excluded.next_at), reserved_for = excluded.reserved_for,
           -- What was begun before may stand before the head.
           task = case when new.attempt > 0 then '' else lane.task end
     where lane.next_at > excluded.next_at or new.attempt > 0 and lane.task <> '';
    return null;
end
$$;

-- Lanes that runs have left, in their one order, and how many of those were running. A lane that is empty goes, of another
-- it is written which task is next. This is looked up when the rows are locked, by a look that is younger than the locks:
-- then nothing can come between. A snapshot that is as old as its transaction shows nothing of that kind, and no lane goes.
create or replace function queue_service.leave_lanes(of_queues text[], with_keys text[], were_running integer[])
returns void language plpgsql set search_path = '' set enable_seqscan = off set enable_bitmapscan = off
set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    places tid[];
    moment timestamptz := clock_timestamp();
    may_go boolean := current_setting('transaction_isolation') = 'read committed';
begin
    select array_agg(locked.place), array_agg(lane.queue), array_agg(lane.ordering_key), array_agg(lane.ended)
      into places, of_queues, with_keys, were_running
      from unnest(of_queues, with_keys, were_running) as lane (queue, ordering_key, ended)
     cross join lateral (
        select lanes.ctid as place from queue_service.lanes
         where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key
           for update
     ) as locked;
    with looked as materialized (
        select lane.place, lane.ended, head.task,
               case when head.run_at > moment - interval '1 second' and head.run_at <= moment
                    then head.reserved_for end as reserved_for
          from unnest(places, of_queues, with_keys, were_running) as lane (place, queue, ordering_key, ended)
          left join lateral (
            select runs.task, runs.run_at, runs.reserved_for from queue_service.runs
             where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
             order by runs.queue, runs.ordering_key, runs.id limit 1
          ) as head on true
    ), gone as (
        delete from queue_service.lanes using looked
         where lanes.ctid = looked.place and looked.task is null and lanes.running <= looked.ended and may_go
    )
    update queue_service.lanes
       set running = greatest(running - looked.ended, 0), task = coalesce(looked.task, ''),
           reserved_for = looked.reserved_for,
           next_at = case when looked.ended > 0 then moment else least(next_at, moment) end
      from looked
     where lanes.ctid = looked.place and not (looked.task is null and lanes.running <= looked.ended and may_go)
       and (looked.ended > 0 or lanes.next_at > moment or lanes.task <> coalesce(looked.task, '')
            or lanes.reserved_for is distinct from looked.reserved_for);
end
$$;

-- The lane of a run that was claimed, put back, or changed while it was queued.
create or replace function queue_service.move_lane() returns trigger language plpgsql set search_path = '' as $$
declare
    is_free boolean;
    next_task text;
begin
    if old.ordering_key is distinct from new.ordering_key then
        if old.ordering_key is not null then
            perform queue_service.leave_lanes(array[old.queue], array[old.ordering_key], array[0]);
        end if;
        if new.ordering_key is not null then
            insert into queue_service.lanes as lane (queue, ordering_key, next_at, width)
            values (new.queue, new.ordering_key, new.run_at,
                    coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1))
                on conflict (queue, ordering_key) do update
               set next_at = least(lane.next_at, excluded.next_at), task = '', reserved_for = null;
        end if;
    elsif old.state = 'running' and new.state = 'queued' then
        update queue_service.lanes
           set running = greatest(running - 1, 0),
               next_at = case when width = 1 then new.run_at else least(next_at, new.run_at) end,
               task = case when width = 1 then new.task else '' end,
               reserved_for = case when width = 1 then new.reserved_for end
         where queue = new.queue and ordering_key = new.ordering_key;
    elsif old.state = 'queued' and new.state = 'running' then
        update queue_service.lanes set running = running + 1
         where queue = new.queue and ordering_key = new.ordering_key
        returning width > running into is_free;
        if is_free then
            select runs.task into next_task from queue_service.runs
             where runs.queue = new.queue and runs.ordering_key = new.ordering_key and runs.state = 'queued'
             order by runs.queue, runs.ordering_key, runs.id limit 1;
            update queue_service.lanes
               set task = coalesce(next_task, ''), reserved_for = null,
                   next_at = case when next_task is null then 'infinity' else next_at end
             where queue = new.queue and ordering_key = new.ordering_key;
        end if;
    else
        update queue_service.lanes
           set next_at = least(next_at, new.run_at), reserved_for = null,
               task = case when new.task = old.task then task else '' end
         where queue = new.queue and ordering_key = new.ordering_key
           and (next_at > new.run_at or new.task <> old.task and task <> '');
    end if;
    return null;
end
$$;

-- Look at these lanes, but for those that another session has locked: remove what is empty, and write of the others which
-- task is next and when, with a look that is younger than the lock. Returns how many it has changed.
create or replace function queue_service.tend_lanes(queues text[], keys text[]) returns integer language plpgsql
set search_path = '' as $$
declare
    lane record;
    head record;
    moment timestamptz;
    at timestamptz;
    owner text;
    counted integer;
    changes integer := 0;
    touched integer;
begin
    for lane in
        select locked.*
          from unnest(queues, keys) as asked (queue, ordering_key)
         cross join lateral (
            select lanes.queue, lanes.ordering_key, lanes.running, lanes.width, lanes.next_at
              from queue_service.lanes
             where lanes.queue = asked.queue and lanes.ordering_key = asked.ordering_key
               for update skip locked
         ) as locked
    loop
        moment := clock_timestamp();
        -- There are fewer than the row says where somebody has deleted some by hand.
        select count(*) into counted
          from (select from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'running'
                 order by runs.queue, runs.ordering_key, runs.id limit lane.running) as running;
        -- Of the runs that hold its places, the first that may begin; without one, the first that waits.
        select first.id, first.task, first.run_at, first.reserved_for into head
          from (select runs.id, runs.task, runs.run_at, runs.reserved_for from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
                   and coalesce(runs.expires_at, 'infinity') > moment and (runs.attempt > 0 or runs.run_at <= moment)
                 order by runs.queue, runs.ordering_key, runs.id
                 limit greatest(lane.width - counted, 1)) as first
         order by case when first.run_at > moment then first.run_at end nulls first, first.id limit 1;
        owner := case when head.run_at > moment - interval '1 second' then head.reserved_for end;
        if head.id is null then
            at := coalesce((
                select min(runs.run_at) from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
                   and runs.attempt = 0 and runs.run_at > moment), 'infinity');
            if at = 'infinity' and current_setting('transaction_isolation') = 'read committed' and not exists (
                select from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key) then
                delete from queue_service.lanes
                 where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key;
                changes := changes + 1;
                continue;
            end if;
        elsif head.run_at > moment then
            at := head.run_at;
        else
            -- One that somebody holds (to cancel it, say) is looked at again soon. One that is an owner's for a second
            -- stays where it is, for the owner to see.
            perform from queue_service.runs where runs.id = head.id for update skip locked;
            if not found then
                at := moment + interval '1 second';
                owner := null;
            elsif owner is not null then
                at := head.run_at;
            else
                at := least(lane.next_at, moment);
            end if;
        end if;
        update queue_service.lanes
           set next_at = at, task = coalesce(head.task, ''), running = counted, reserved_for = owner
         where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key
           and (lanes.next_at, lanes.task, lanes.running, lanes.reserved_for)
               is distinct from (at, coalesce(head.task, ''), counted, owner);
        get diagnostics touched = row_count;
        changes := changes + touched;
    end loop;
    return changes;
end
$$;
"""

FUNCTIONS_BEFORE = """
-- The lane of a run that was stored. Its row is locked until the end of the transaction, and changed only where there is
-- something to say: of an enqueue and the end of the last run, whichever comes second sees the other.
create or replace function queue_service.join_lane() returns trigger language plpgsql set search_path = '' as $$
begin
    insert into queue_service.lanes as lane (queue, ordering_key, next_at, width, task)
    values (new.queue, new.ordering_key, new.run_at,
            coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1), new.task)
        on conflict (queue, ordering_key) do update
       set next_at = least(lane.next_at, excluded.next_at),
           -- What was begun before may stand before the head.
           task = case when new.attempt > 0 then '' else lane.task end
     where lane.next_at > excluded.next_at or new.attempt > 0 and lane.task <> '';
    return null;
end
$$;

-- Lanes that runs have left, in their one order, and how many of those were running. A lane that is empty goes, of another
-- it is written which task is next. This is looked up when the rows are locked, by a look that is younger than the locks:
-- then nothing can come between. A snapshot that is as old as its transaction shows nothing of that kind, and no lane goes.
create or replace function queue_service.leave_lanes(of_queues text[], with_keys text[], were_running integer[])
returns void language plpgsql set search_path = '' set enable_seqscan = off set enable_bitmapscan = off
set enable_hashjoin = off set enable_mergejoin = off as $$
declare
    places tid[];
    moment timestamptz := clock_timestamp();
    may_go boolean := current_setting('transaction_isolation') = 'read committed';
begin
    select array_agg(locked.place), array_agg(lane.queue), array_agg(lane.ordering_key), array_agg(lane.ended)
      into places, of_queues, with_keys, were_running
      from unnest(of_queues, with_keys, were_running) as lane (queue, ordering_key, ended)
     cross join lateral (
        select lanes.ctid as place from queue_service.lanes
         where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key
           for update
     ) as locked;
    with looked as materialized (
        select lane.place, lane.ended, (
            select runs.task from queue_service.runs
             where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
             order by runs.queue, runs.ordering_key, runs.id limit 1) as task
          from unnest(places, of_queues, with_keys, were_running) as lane (place, queue, ordering_key, ended)
    ), gone as (
        delete from queue_service.lanes using looked
         where lanes.ctid = looked.place and looked.task is null and lanes.running <= looked.ended and may_go
    )
    update queue_service.lanes
       set running = greatest(running - looked.ended, 0), task = coalesce(looked.task, ''),
           next_at = case when looked.ended > 0 then moment else least(next_at, moment) end
      from looked
     where lanes.ctid = looked.place and not (looked.task is null and lanes.running <= looked.ended and may_go)
       and (looked.ended > 0 or lanes.next_at > moment or lanes.task <> coalesce(looked.task, ''));
end
$$;

-- The lane of a run that was claimed, put back, or changed while it was queued.
create or replace function queue_service.move_lane() returns trigger language plpgsql set search_path = '' as $$
declare
    is_free boolean;
    next_task text;
begin
    if old.ordering_key is distinct from new.ordering_key then
        if old.ordering_key is not null then
            perform queue_service.leave_lanes(array[old.queue], array[old.ordering_key], array[0]);
        end if;
        if new.ordering_key is not null then
            insert into queue_service.lanes as lane (queue, ordering_key, next_at, width)
            values (new.queue, new.ordering_key, new.run_at,
                    coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1))
                on conflict (queue, ordering_key) do update
               set next_at = least(lane.next_at, excluded.next_at), task = '';
        end if;
    elsif old.state = 'running' and new.state = 'queued' then
        update queue_service.lanes
           set running = greatest(running - 1, 0),
               next_at = case when width = 1 then new.run_at else least(next_at, new.run_at) end,
               task = case when width = 1 then new.task else '' end
         where queue = new.queue and ordering_key = new.ordering_key;
    elsif old.state = 'queued' and new.state = 'running' then
        update queue_service.lanes set running = running + 1
         where queue = new.queue and ordering_key = new.ordering_key
        returning width > running into is_free;
        if is_free then
            select runs.task into next_task from queue_service.runs
             where runs.queue = new.queue and runs.ordering_key = new.ordering_key and runs.state = 'queued'
             order by runs.queue, runs.ordering_key, runs.id limit 1;
            update queue_service.lanes
               set task = coalesce(next_task, ''), next_at = case when next_task is null then 'infinity' else next_at end
             where queue = new.queue and ordering_key = new.ordering_key;
        end if;
    else
        update queue_service.lanes
           set next_at = least(next_at, new.run_at), task = case when new.task = old.task then task else '' end
         where queue = new.queue and ordering_key = new.ordering_key
           and (next_at > new.run_at or new.task <> old.task and task <> '');
    end if;
    return null;
end
$$;

-- Look at these lanes, but for those that another session has locked: remove what is empty, and write of the others which
-- task is next and when, with a look that is younger than the lock. Returns how many it has changed.
create or replace function queue_service.tend_lanes(queues text[], keys text[]) returns integer language plpgsql
set search_path = '' as $$
declare
    lane record;
    head record;
    moment timestamptz;
    at timestamptz;
    counted integer;
    changes integer := 0;
    touched integer;
begin
    for lane in
        select locked.*
          from unnest(queues, keys) as asked (queue, ordering_key)
         cross join lateral (
            select lanes.queue, lanes.ordering_key, lanes.running, lanes.width, lanes.next_at from queue_service.lanes
             where lanes.queue = asked.queue and lanes.ordering_key = asked.ordering_key
               for update skip locked
         ) as locked
    loop
        moment := clock_timestamp();
        -- There are fewer than the row says where somebody has deleted some by hand.
        select count(*) into counted
          from (select from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'running'
                 order by runs.queue, runs.ordering_key, runs.id limit lane.running) as running;
        -- Of the runs that hold its places, the first that may begin; without one, the first that waits.
        select first.id, first.task, first.run_at, first.reserved_for into head
          from (select runs.id, runs.task, runs.run_at, runs.reserved_for from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
                   and coalesce(runs.expires_at, 'infinity') > moment and (runs.attempt > 0 or runs.run_at <= moment)
                 order by runs.queue, runs.ordering_key, runs.id
                 limit greatest(lane.width - counted, 1)) as first
         order by case when first.run_at > moment then first.run_at end nulls first, first.id limit 1;
        if head.id is null then
            at := coalesce((
                select min(runs.run_at) from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key and runs.state = 'queued'
                   and runs.attempt = 0 and runs.run_at > moment), 'infinity');
            if at = 'infinity' and current_setting('transaction_isolation') = 'read committed' and not exists (
                select from queue_service.runs
                 where runs.queue = lane.queue and runs.ordering_key = lane.ordering_key) then
                delete from queue_service.lanes
                 where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key;
                changes := changes + 1;
                continue;
            end if;
        elsif head.run_at > moment then
            at := head.run_at;
        else
            -- One that somebody holds (to cancel it, say), or that is another's for a second, is looked at again soon.
            perform from queue_service.runs where runs.id = head.id for update skip locked;
            at := case when found and (head.reserved_for is null or head.run_at < moment - interval '1 second')
                       then least(lane.next_at, moment) else moment + interval '1 second' end;
        end if;
        update queue_service.lanes set next_at = at, task = coalesce(head.task, ''), running = counted
         where lanes.queue = lane.queue and lanes.ordering_key = lane.ordering_key
           and (lanes.next_at, lanes.task, lanes.running) is distinct from (at, coalesce(head.task, ''), counted);
        get diagnostics touched = row_count;
        changes := changes + touched;
    end loop;
    return changes;
end
$$;
"""


def upgrade() -> None:
    op.execute("alter table queue_service.lanes add column reserved_for text")
    op.execute(FUNCTIONS)
    op.execute(RENDERINGS)


def downgrade() -> None:
    op.execute("drop table queue_service.renderings")
    op.execute(FUNCTIONS_BEFORE)
    op.execute("alter table queue_service.lanes drop column reserved_for")
