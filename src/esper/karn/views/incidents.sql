-- What deserves attention?
-- The open ones first. A run that has fallen silent is told of here, because it cannot tell itself.
WITH clock AS (SELECT (julianday('now') - 2440587.5) * 86400 AS unix_s)
SELECT
    kind, subject, iif(closed_unix_s IS NULL, 'open', 'over') AS state, message, value,
    opened_round, opened_unix_s - started_unix_s AS opened_after_s,
    closed_round, coalesce(closed_unix_s, heartbeat_unix_s) - opened_unix_s AS lasted_s
FROM incident, run
UNION ALL
SELECT
    'heartbeat_late', 'process', 'open', printf('nothing was heard of the run for %.0f s, longer than %g', silent_s, late_s),
    silent_s, NULL, after_s, NULL, silent_s
FROM (
    SELECT unix_s - heartbeat_unix_s AS silent_s, heartbeat_late_s AS late_s, heartbeat_unix_s - started_unix_s AS after_s
    FROM run, clock WHERE status = 'running' AND unix_s - heartbeat_unix_s > heartbeat_late_s)
ORDER BY state, opened_after_s
