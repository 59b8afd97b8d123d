-- Signs of life, and their absence: what moves the deadline of a turn.

-- name: extend
-- A sign of life: the deadline of each turn of the deployment is the execution's from now on, except of those withheld.
-- A withheld one that has had no sign of life yet stops waiting to be taken up: its admission becomes an execution, once.
-- Rows: ids of the messages that were extended.
-- writes: turn_markers
with extended as (
    update queue_service.turn_markers as m
       set deadline = least(clock_timestamp() + m.execution, m.ends_by,
                            case when m.failure_code is not null then m.deadline end),
           admitted_at = coalesce(m.admitted_at, clock_timestamp())
     where m.deployment = %(deployment)s and m.message_id = any(array(
            select owed.message_id from queue_service.turn_markers as owed
             where owed.deployment = %(deployment)s and (owed.failure_code is null or owed.admitted_at is null)
             order by owed.message_id
               for update))
       and (m.failure_code is null or m.admitted_at is null)
    returning m.message_id, m.failure_code
)
select message_id from extended where failure_code is null

-- name: withhold
-- The provider failed: signs of life no longer extend the turns of the deployment, and if they lapse, they end with this
-- failure. Rows: message ids.
-- writes: turn_markers
update queue_service.turn_markers as m
   set failure_code = %(code)s, failure_reason = %(reason)s
 where m.deployment = %(deployment)s and m.message_id = any(array(
        select owed.message_id from queue_service.turn_markers as owed
         where owed.deployment = %(deployment)s
         order by owed.message_id
           for update))
returning m.message_id

-- name: restore
-- The provider recovered, which is a sign of life. Rows: ids of the messages that had been withheld.
-- writes: turn_markers
update queue_service.turn_markers as m
   set failure_code = null, failure_reason = null, deadline = least(clock_timestamp() + m.execution, m.ends_by),
       admitted_at = coalesce(m.admitted_at, clock_timestamp())
 where m.deployment = %(deployment)s and m.message_id = any(array(
        select owed.message_id from queue_service.turn_markers as owed
         where owed.deployment = %(deployment)s and owed.failure_code is not null
         order by owed.message_id
           for update))
returning m.message_id

-- define: in_outage
-- The turns of an organization, or of a provider (as their metadata names it), locked: every turn that is owed its ending is
-- looked at. They are then found by their keys, since one that was extended meanwhile has moved.
in_outage as materialized (
    select owed.deployment, owed.message_id
      from queue_service.turn_markers as owed
     where (%(organization_id)s::text is null or owed.organization_id = %(organization_id)s)
       and (%(provider)s::text is null or owed.metadata ->> 'provider'::text = %(provider)s)
     order by owed.deployment, owed.message_id
       for update
)

-- name: withhold_all
-- As `withhold`, of an organization or a provider.
-- writes: turn_markers
with {in_outage}
update queue_service.turn_markers as m set failure_code = %(code)s, failure_reason = %(reason)s
 where m.deployment = any(array(select in_outage.deployment from in_outage))
   and m.message_id = any(array(select in_outage.message_id from in_outage))
   and (m.deployment, m.message_id) in (select in_outage.deployment, in_outage.message_id from in_outage)
returning m.message_id

-- name: restore_all
-- As `restore`, of an organization or a provider.
-- writes: turn_markers
with {in_outage}
update queue_service.turn_markers as m
   set failure_code = null, failure_reason = null, deadline = least(clock_timestamp() + m.execution, m.ends_by),
       admitted_at = coalesce(m.admitted_at, clock_timestamp())
 where m.deployment = any(array(select in_outage.deployment from in_outage))
   and m.message_id = any(array(select in_outage.message_id from in_outage))
   and (m.deployment, m.message_id) in (select in_outage.deployment, in_outage.message_id from in_outage) and m.failure_code is not null
returning m.message_id

-- name: reset_admission
-- The turn waits to be taken up again, with a whole admission before it. Row: its message id.
-- writes: turn_markers
update queue_service.turn_markers as m
   set deadline = least(clock_timestamp() + m.admission, m.ends_by), admitted_at = null
 where m.deployment = %(deployment)s and m.message_id = %(message_id)s
returning m.message_id
