"""Whose a row is: streams, events and turns have the organization, too, and a singleton key is one of an organization.

What is needed for `queue-service db rls enable`, which makes the policies. Nobody's rows are rewritten: what was stored
before has no organization in the new columns, and neither has what the version before stores, except in a session that has
an organization. Its statements name the columns of the old index of singleton keys, which therefore stays until 0026.

Phase: expand. Lock: all tables, for as long as it takes to index the live runs that have a singleton key.
"""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

# What each session says of itself, or its role has been given. Everybody may ask, also where the owner's functions are not
# everybody's by default: the columns below ask for whoever inserts, and roles at work were granted it by nobody yet.
ORGANIZATION = """
create function queue_service.organization() returns text language sql stable parallel safe
return nullif(pg_catalog.current_setting('queue_service.organization_id', true), '');
grant execute on function queue_service.organization() to public;
"""

TABLES = ("streams", "events", "turn_outcomes", "receipts")

# Two commands: a default that comes with its column would be computed now, and kept as the value of every row there is.
COLUMN = """
alter table queue_service.{table} add column organization_id text;
alter table queue_service.{table} alter column organization_id set default queue_service.organization();
"""

SINGLETONS = """
create unique index runs_singleton_key_idx on queue_service.runs (queue, singleton_key, organization_id) nulls not distinct
 where singleton_key is not null
"""

# Lanes belong to nobody, and are kept by looking at all runs: what a session does not see is in them all the same. Without
# this, the last run of one organization would take the lane of another one's along.
LANES = ("leave_lanes(text[], text[], integer[])", "tend_lanes(text[], text[])")
AS_OWNER = "alter function queue_service.{function} security definer set search_path = pg_catalog, pg_temp"
# Whoever may change a lane by hand may call them, and nobody else may, whatever was granted before.
CALLERS = """
do $$
declare
    called regprocedure := 'queue_service.{function}';
    keeper text := (select relowner::regrole from pg_catalog.pg_class where oid = 'queue_service.lanes'::regclass);
    role record;
begin
    execute 'alter function ' || called || ' owner to ' || keeper;
    for role in select case acl.grantee when 0 then 'public' else acl.grantee::regrole::text end as name
                  from pg_catalog.pg_proc as proc
                 cross join lateral pg_catalog.aclexplode(
                       coalesce(proc.proacl, pg_catalog.acldefault('f', proc.proowner))) as acl
                 where proc.oid = called and acl.grantee <> proc.proowner loop
        execute 'revoke all on function ' || called || ' from ' || role.name;
    end loop;
    for role in select case acl.grantee when 0 then 'public' else acl.grantee::regrole::text end as name
                  from pg_catalog.pg_class as lanes
                 cross join lateral pg_catalog.aclexplode(lanes.relacl) as acl
                 where lanes.oid = 'queue_service.lanes'::regclass and acl.privilege_type = 'UPDATE' loop
        execute 'grant execute on function ' || called || ' to ' || role.name;
    end loop;
end
$$;
"""
AS_CALLER = "alter function queue_service.{function} security invoker set search_path = ''"

FUNCTIONS = """
-- Whether no run is hidden from this session's role: it is exempt from the policies, or there are none.
create function queue_service.sees_all_runs() returns boolean language plpgsql stable
set search_path = pg_catalog, pg_temp as $$
begin
    return not row_security_active('queue_service.runs') or exists (
        select from pg_policy
         where polrelid = 'queue_service.runs'::regclass and polname = 'queue_service_exempt'
           and exists (select from unnest(polroles) as exempt (role)
                        where exempt.role = 0 or pg_has_role(exempt.role, 'usage')));
end
$$;

-- Give a partition of `finished_runs` the policies that this table has. Policies hold for the table that a statement names,
-- and a partition that is named itself has none from its parent.
create function queue_service.inherit_policies(partition regclass) returns void language plpgsql
set search_path = pg_catalog, pg_temp as $$
declare
    policy record;
begin
    for policy in
        select polname, pg_get_expr(polqual, polrelid) as visible,
               case when polroles = '{0}' then 'public' else (
                   select string_agg(quote_ident(rolname), ', ' order by rolname) from pg_roles where oid = any(polroles))
               end as roles
          from pg_policy
         where polrelid = 'queue_service.finished_runs'::regclass
           and polname in ('queue_service_own', 'queue_service_exempt')
    loop
        execute format('drop policy if exists %I on %s', policy.polname, partition);
        execute format('create policy %I on %s to %s using (%s)', policy.polname, partition, policy.roles, policy.visible);
    end loop;
    if (select relrowsecurity from pg_class where oid = 'queue_service.finished_runs'::regclass) then
        execute format('alter table %s enable row level security', partition);
    end if;
end
$$;
"""

ENDINGS = """
-- Of turns whose markers the caller has just deleted: the outcome, the event and, for a channel, the run that delivers it.
-- Rows: those that had no ending yet. Locks streams in ascending order, then the lanes of deliveries.
create or replace function queue_service.store_endings(given queue_service.turn_ending[], notify boolean)
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
        insert into queue_service.streams (stream, head, organization_id)
        select due.stream, count(*), max(due.organization_id) from due group by due.stream order by due.stream
            on conflict (stream) do update
           set head = streams.head + excluded.head,
               organization_id = coalesce(streams.organization_id, excluded.organization_id)
        returning stream, head, organization_id
    ), numbered as materialized (
        select due.*,
               ((select jsonb_object_agg(heads.stream, heads.head) from heads) -> due.stream)::bigint
               + 1 - row_number() over (partition by due.stream order by armed_at desc, message_id desc) as seq,
               (select jsonb_object_agg(heads.stream, heads.organization_id) from heads) ->> due.stream as owner
          from due
    ), outcomes as (
        -- The unique key has the last word, whatever this statement's snapshot did not show.
        insert into queue_service.turn_outcomes (deployment, message_id, stream, armed_at, ended_at, seq, kind, code,
                                                 organization_id)
        select deployment, message_id, stream, armed_at, clock_timestamp(), seq, kind, code, organization_id from numbered
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
        -- An event is of the organization of its stream.
        insert into queue_service.events (stream, seq, kind, organization_id, terminal, body)
        select stream, seq, kind, owner, true,
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

-- Arm the turn that a run has in its metadata, where it has one, with the deadlines of the schedule.
create or replace function queue_service.arm_slot(of_run bigint, metadata jsonb, deadlines jsonb) returns void
language plpgsql set search_path = ''
set enable_seqscan = off set enable_bitmapscan = off set enable_mergejoin = off as $$
declare
    turn jsonb := metadata -> 'turn';
    now timestamptz := clock_timestamp();
    total interval := (deadlines ->> 'total')::interval;
begin
    insert into queue_service.turn_outcomes (deployment, message_id, stream, organization_id)
    values (turn ->> 'deployment', turn ->> 'message_id', turn ->> 'stream', turn ->> 'organization_id')
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
    insert into queue_service.streams (stream, organization_id) values (turn ->> 'stream', turn ->> 'organization_id')
        on conflict (stream) do nothing;
end
$$;
"""

ENDINGS_BEFORE = """
-- Of turns whose markers the caller has just deleted: the outcome, the event and, for a channel, the run that delivers it.
-- Rows: those that had no ending yet. Locks streams in ascending order, then the lanes of deliveries.
create or replace function queue_service.store_endings(given queue_service.turn_ending[], notify boolean)
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

-- Arm the turn that a run has in its metadata, where it has one, with the deadlines of the schedule.
create or replace function queue_service.arm_slot(of_run bigint, metadata jsonb, deadlines jsonb) returns void
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
"""

# The columns that go are what the policies look at.
UNSECURED = """
do $$
begin
    if exists (select from pg_catalog.pg_policy
                where polname in ('queue_service_own', 'queue_service_exempt')
                  and polrelid in (select oid from pg_catalog.pg_class where relnamespace = 'queue_service'::regnamespace))
    then
        raise exception using message =
            'row security is on, and revision 0024 knows no organizations. Turn it off first: queue-service db rls disable';
    end if;
end
$$;
"""


def upgrade() -> None:
    op.execute(ORGANIZATION)
    for table in TABLES:
        op.execute(COLUMN.format(table=table))
    op.execute(SINGLETONS)
    op.execute(FUNCTIONS)
    op.execute(ENDINGS)
    for function in LANES:
        op.execute(AS_OWNER.format(function=function))
        op.execute(CALLERS.format(function=function))


def downgrade() -> None:
    op.execute(UNSECURED)
    for function in LANES:
        op.execute(AS_CALLER.format(function=function))
        op.execute(f"grant execute on function queue_service.{function} to public")
    op.execute(ENDINGS_BEFORE)
    op.execute("drop function queue_service.inherit_policies(regclass)")
    op.execute("drop function queue_service.sees_all_runs()")
    op.execute("drop index queue_service.runs_singleton_key_idx")
    for table in TABLES:
        op.execute(f"alter table queue_service.{table} drop column organization_id")
    op.execute("drop function queue_service.organization()")
