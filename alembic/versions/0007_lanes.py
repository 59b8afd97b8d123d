"""Lanes: runs of one queue with one ordering key run one at a time, in the order they were enqueued.

Each lane with live runs has a row here, kept by a trigger on `runs`, so that no statement that stores, moves or ends a run
can forget it. Runs of a lane are in no claim index: the lane is what is claimed from, and its head is looked up.

Phase: expand. Lock: `runs` exclusively while its claim index is built anew.
"""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

TABLE = """
create table queue_service.lanes (
    queue        text not null,
    ordering_key text not null,
    -- Live runs, and the one that is running.
    pending      bigint not null default 1,
    run_id       bigint,
    -- Not before this is there something to claim, as far as is known.
    next_at      timestamptz not null,
    constraint lanes_pkey primary key (queue, ordering_key)
) with (
    fillfactor = 50,
    autovacuum_vacuum_threshold = 1000,
    autovacuum_vacuum_scale_factor = 0.01
);

create index lanes_claim_idx on queue_service.lanes (queue, next_at) where run_id is null;
create index runs_lane_idx on queue_service.runs (queue, ordering_key, id) where ordering_key is not null;
"""

TRIGGERS = """
create function queue_service.keep_lane() returns trigger language plpgsql set search_path = '' as $$
begin
    if tg_op = 'UPDATE' and old.ordering_key is not distinct from new.ordering_key then
        update queue_service.lanes
           set run_id = case when new.state = 'running' then new.id else nullif(run_id, new.id) end,
               next_at = case when new.state = 'running' then next_at
                              when old.state = 'running' then new.run_at else least(next_at, new.run_at) end
         where queue = new.queue and ordering_key = new.ordering_key;
        return null;
    end if;
    if tg_op <> 'INSERT' and old.ordering_key is not null then
        -- The count is looked at once more when the row is locked: of an enqueue and the end of the last run, whichever
        -- comes second sees the other.
        delete from queue_service.lanes where queue = old.queue and ordering_key = old.ordering_key and pending = 1;
        if not found then
            update queue_service.lanes
               set pending = pending - 1, run_id = nullif(run_id, old.id), next_at = clock_timestamp()
             where queue = old.queue and ordering_key = old.ordering_key;
        end if;
    end if;
    if tg_op <> 'DELETE' and new.ordering_key is not null then
        insert into queue_service.lanes as lane (queue, ordering_key, next_at)
        values (new.queue, new.ordering_key, new.run_at)
            on conflict (queue, ordering_key) do update
           set pending = lane.pending + 1, next_at = least(lane.next_at, excluded.next_at);
    end if;
    return null;
end
$$;

create trigger runs_lane_stored after insert on queue_service.runs
    for each row when (new.ordering_key is not null) execute function queue_service.keep_lane();
create trigger runs_lane_gone after delete on queue_service.runs
    for each row when (old.ordering_key is not null) execute function queue_service.keep_lane();
create trigger runs_lane_moved after update on queue_service.runs
    for each row when ((old.ordering_key is not null or new.ordering_key is not null)
        and (old.state, old.run_at) is distinct from (new.state, new.run_at)
            or old.ordering_key is distinct from new.ordering_key)
    execute function queue_service.keep_lane();
"""

FILL = """
insert into queue_service.lanes (queue, ordering_key, pending, run_id, next_at)
select queue, ordering_key, count(*), min(id) filter (where state = 'running'), min(run_at)
  from queue_service.runs where ordering_key is not null group by queue, ordering_key
"""

CLAIM_INDEX = "create index runs_claim_idx on queue_service.runs (queue, priority desc, run_at, (id + 0))"


def upgrade() -> None:
    op.execute("lock table queue_service.runs in access exclusive mode")
    op.execute(TABLE)
    op.execute("drop index queue_service.runs_claim_idx")
    op.execute(f"{CLAIM_INDEX} where ordering_key is null")
    op.execute(TRIGGERS)
    op.execute(FILL)


def downgrade() -> None:
    op.execute("lock table queue_service.runs in access exclusive mode")
    for name in ("stored", "gone", "moved"):
        op.execute(f"drop trigger runs_lane_{name} on queue_service.runs")
    op.execute("drop function queue_service.keep_lane()")
    op.execute("drop table queue_service.lanes")
    op.execute("drop index queue_service.runs_lane_idx, queue_service.runs_claim_idx")
    op.execute(CLAIM_INDEX)
