-- Every statement about who runs a deployment's child. One process at a time holds a deployment, for as long as it renews
-- its lease. `holding` names one start of a child, so that two of one process are told apart.

-- name: hold
-- Hold a deployment, unless another holds it; with `ask`, that one hears that it is wanted. Row: who holds it now, whether
-- it is this holding, and the seconds before which it cannot lapse. No row: another session is at it, ask again.
-- writes: deployments
with taken as (
    insert into queue_service.deployments as held (deployment, owner, holding, expires_at)
    values (%(deployment)s, %(owner)s, %(holding)s, clock_timestamp() + %(lease)s::interval)
        on conflict (deployment) do update
       set owner = excluded.owner, holding = excluded.holding, held_at = excluded.held_at,
           expires_at = excluded.expires_at, wanted_at = null
     where held.holding = excluded.holding or held.expires_at < clock_timestamp()
    returning owner, expires_at
), asked as (
    update queue_service.deployments set wanted_at = clock_timestamp()
     where deployment = %(deployment)s and %(ask)s and not exists (select from taken)
)
select owner, true, extract(epoch from expires_at - clock_timestamp())::float8 from taken
union all
select owner, false, extract(epoch from expires_at - clock_timestamp())::float8 from queue_service.deployments
 where deployment = %(deployment)s and not exists (select from taken)

-- name: renew
-- Push the deadline of a holding, also one that has lapsed, if nobody took it over. Row: whether somebody has asked for it
-- within the length of a lease. None: it is another's.
-- writes: deployments
update queue_service.deployments set expires_at = clock_timestamp() + %(lease)s::interval
 where deployment = %(deployment)s and holding = %(holding)s
returning coalesce(wanted_at > clock_timestamp() - %(lease)s::interval, false)

-- name: release
-- Let a holding go. Row: the deployment; none where it was another's.
-- writes: deployments
delete from queue_service.deployments where deployment = %(deployment)s and holding = %(holding)s returning deployment

-- name: prune
-- Delete the holdings whose lease lapsed longer than `age` ago.
-- writes: deployments
delete from queue_service.deployments where expires_at < clock_timestamp() - %(age)s::interval
