-- What statements of several files share.
--
-- A plan that was made while a table was empty is kept when it is full, and as a join it would read the whole of it. So no
-- table is joined: a row is looked up in a lateral subquery with a limit, which has no plan but its key; and where a join
-- cannot be avoided (a row that is deleted or updated), its key is bounded by arrays as well. What the statement has made
-- itself is believed to be one row: it is looked up in a hash (an `in` that is no condition by itself, so that it does not
-- become a join) or in an object, not joined by a loop within a loop.

-- define: marker_fields
m.deployment, m.message_id, m.stream, m.platform, m.channel_id, m.user_id, m.organization_id, m.metadata, m.armed_at,
              m.run_id
