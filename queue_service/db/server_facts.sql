-- What the server says of itself, as far as the role that asks may see it. Nothing here changes anything.

-- name: server_settings
-- Settings by name: with what sessions of this role begin, and whether the server was given it on its command line.
select name, reset_val, source = 'command line' from pg_catalog.pg_settings where name = any(%(names)s::text[])

-- name: server_place
-- Whether this is a standby, how many connections the role and the database may have (null: as many as the server),
-- whether the role may use those that the server keeps back, and whether it may read who is on the roster. Who is there may
-- all be of another role, as where the owner looks: then its limit is nobody's.
with who (is_login) as (
    select usename = session_user from pg_catalog.pg_stat_activity
     where datname = pg_catalog.current_database() and application_name in ('queue_service keeper', 'queue_service listener')
)
select pg_catalog.pg_is_in_recovery(),
       case when not login.rolsuper and login.rolconnlimit >= 0
             and (select coalesce(pg_catalog.bool_or(is_login), true) from who) then login.rolconnlimit end,
       case when not login.rolsuper and place.datconnlimit >= 0 then place.datconnlimit end,
       login.rolsuper, session_user::text, current_user::text, place.datname::text,
       pg_catalog.has_table_privilege('queue_service.workers', 'select')
           and pg_catalog.has_table_privilege('queue_service.gateways', 'select')
  from pg_catalog.pg_roles as login, pg_catalog.pg_database as place
 where login.rolname = session_user and place.datname = pg_catalog.current_database()

-- name: server_standbys
-- Those who take what this server writes: their names, what they do and whether commits wait for them, the last two null
-- where this role may not see it. Subscribers of logical replication, backups and archives are not among them, unless commits wait for
-- them.
select sender.application_name, sender.state, sender.sync_state
  from pg_catalog.pg_stat_replication as sender
 where sender.sync_state in ('sync', 'quorum')
    or (sender.state is distinct from 'backup' and sender.application_name not in ('pg_receivewal', 'pg_basebackup')
        and sender.pid not in (select slot.active_pid from pg_catalog.pg_replication_slots as slot
                                where slot.slot_type = 'logical' and slot.active_pid is not null))
 order by sender.application_name

-- name: server_empty_slots
-- The places kept for standbys that are not there: names of slots.
select slot.slot_name::text from pg_catalog.pg_replication_slots as slot
 where slot.slot_type = 'physical' and not slot.active and not slot.temporary order by slot.slot_name

-- name: server_unvacuumed
-- Our tables from which autovacuum was told to keep away, or from the large values of which.
select coalesce(owner.relname, class.relname)::text
  from pg_catalog.pg_class as class
  left join pg_catalog.pg_class as owner on owner.reltoastrelid = class.oid
 where coalesce(owner.relnamespace, class.relnamespace) = pg_catalog.to_regnamespace('queue_service')
   and exists (
       select from pg_catalog.pg_options_to_table(class.reloptions) as given (name, value)
        where case when given.name = 'autovacuum_enabled' then not given.value::boolean end)
 group by 1 order by 1

-- name: server_processes
-- How many workers were seen within `silence`, and how many gateways are there.
select (select count(*) from queue_service.workers where workers.seen_at > clock_timestamp() - %(silence)s::interval),
       (select count(*) from queue_service.gateways where gateways.expires_at > clock_timestamp())
