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

-- name: reset_admission
-- The turn waits to be taken up again, with a whole admission before it. Row: its message id.
-- writes: turn_markers
update queue_service.turn_markers as m
   set deadline = least(clock_timestamp() + m.admission, m.ends_by), admitted_at = null
 where m.deployment = %(deployment)s and m.message_id = %(message_id)s
returning m.message_id
