"""A run that is replaced goes from one lane to another in the order of their keys.

It left the one and joined the other, whatever their order. Two that crossed waited for each other, and the server ended one
of them after a second.

Phase: expand. Lock: none but on the function.
"""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

MOVE_LANE = """
-- The lane of a run that was claimed, put back, or changed while it was queued.
create or replace function queue_service.move_lane() returns trigger language plpgsql set search_path = '' as $$
declare
    is_free boolean;
    next_task text;
    leaves_first boolean;
begin
    if old.ordering_key is distinct from new.ordering_key then
        -- Whoever else locks both lanes takes them in the order of their keys.
        leaves_first := coalesce(old.ordering_key < new.ordering_key, true);
        if old.ordering_key is not null and leaves_first then
            perform queue_service.leave_lanes(array[old.queue], array[old.ordering_key], array[0]);
        end if;
        if new.ordering_key is not null then
            insert into queue_service.lanes as lane (queue, ordering_key, next_at, width)
            values (new.queue, new.ordering_key, new.run_at,
                    coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1))
                on conflict (queue, ordering_key) do update
               set next_at = least(lane.next_at, excluded.next_at), task = '', reserved_for = null;
        end if;
        if old.ordering_key is not null and not leaves_first then
            perform queue_service.leave_lanes(array[old.queue], array[old.ordering_key], array[0]);
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
"""

MOVE_LANE_BEFORE = """
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
"""


def upgrade() -> None:
    op.execute(MOVE_LANE)


def downgrade() -> None:
    op.execute(MOVE_LANE_BEFORE)
