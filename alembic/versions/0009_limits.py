"""Queues may say how many of their runs go on at once, of each ordering key how many, and how many may begin in a time.

A lane counts its running runs now, for there may be several. Claims of a queue with a limit mark their leases, so that
what runs is counted without reading what other queues hold.

Phase: contract, since `lanes.run_id` goes: workers of the revision before must have stopped. Lock: `lanes`, `queues` and
`leases` exclusively, for as long as it takes to write each lane once.
"""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

QUEUES = """
alter table queue_service.queues
    add column max_running integer,
    add column max_running_per_key integer,
    -- So many may begin in each period; as many as the burst at once. What was left of that at a time.
    add column rate integer,
    add column period interval,
    add column burst integer,
    add column tokens double precision,
    add column tokens_at timestamptz,
    -- Claims under a limit. One that changed since a statement began to look tells it that its count is out of date.
    add column claims bigint not null default 0,
    add constraint queues_limits_check check (
        max_running > 0 and max_running_per_key > 0 and rate > 0 and period > '0' and burst > 0),
    add constraint queues_rate_check check (
        num_nulls(rate, period, burst, tokens, tokens_at) in (0, 5))
"""

LANES = """
alter table queue_service.lanes
    add column running integer not null default 0,
    -- How many may.
    add column width integer not null default 1;
update queue_service.lanes set running = 1 where run_id is not null;
drop index queue_service.lanes_claim_idx;
alter table queue_service.lanes drop column run_id;
create index lanes_claim_idx on queue_service.lanes (queue, next_at) where running < width;
"""

KEEP_LANE = """
create or replace function queue_service.keep_lane() returns trigger language plpgsql set search_path = '' as $$
begin
    if tg_op = 'UPDATE' and old.ordering_key is not distinct from new.ordering_key then
        update queue_service.lanes
           set running = running + (new.state = 'running')::integer - (old.state = 'running')::integer,
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
               set pending = pending - 1, running = running - (old.state = 'running')::integer,
                   next_at = clock_timestamp()
             where queue = old.queue and ordering_key = old.ordering_key;
        end if;
    end if;
    if tg_op <> 'DELETE' and new.ordering_key is not null then
        insert into queue_service.lanes as lane (queue, ordering_key, next_at, width)
        values (new.queue, new.ordering_key, new.run_at,
                coalesce((select max_running_per_key from queue_service.queues where name = new.queue), 1))
            on conflict (queue, ordering_key) do update
           set pending = lane.pending + 1, next_at = least(lane.next_at, excluded.next_at);
    end if;
    return null;
end
$$
"""

BEFORE = """
alter table queue_service.lanes add column run_id bigint;
update queue_service.lanes
   set run_id = (select min(id) from queue_service.runs where runs.queue = lanes.queue
                    and runs.ordering_key = lanes.ordering_key and runs.state = 'running');
drop index queue_service.lanes_claim_idx;
alter table queue_service.lanes drop column running, drop column width;
create index lanes_claim_idx on queue_service.lanes (queue, next_at) where run_id is null;
"""

KEEP_LANE_BEFORE = """
create or replace function queue_service.keep_lane() returns trigger language plpgsql set search_path = '' as $$
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
$$
"""


def upgrade() -> None:
    op.execute("lock table queue_service.lanes, queue_service.queues, queue_service.leases in access exclusive mode")
    op.execute(QUEUES)
    op.execute("alter table queue_service.leases add column limited boolean not null default false")
    op.execute(LANES)
    op.execute(KEEP_LANE)


def downgrade() -> None:
    op.execute("lock table queue_service.lanes, queue_service.queues, queue_service.leases in access exclusive mode")
    op.execute(BEFORE)
    op.execute(KEEP_LANE_BEFORE)
    op.execute("alter table queue_service.leases drop column limited")
    for column in ("max_running", "max_running_per_key", "rate", "period", "burst", "tokens", "tokens_at", "claims"):
        op.execute(f"alter table queue_service.queues drop column {column}")
