-- How does the run stand?
-- `lost`: it says that it runs, but has been silent for longer than its heartbeat allows; it was killed, or its machine.
WITH clock AS (SELECT (julianday('now') - 2440587.5) * 86400 AS unix_s),
done AS (SELECT sum(decisions) AS decisions, max(round) AS round FROM round),
result AS (
    SELECT avg(test_accuracy) AS accuracy, avg(test_loss_nats) AS loss_nats, avg(host_parameters + added_parameters) AS parameters
    FROM round JOIN episode USING (round)
    WHERE purpose IN ('grow', 'test') AND twin_row IS NOT NULL AND test_accuracy IS NOT NULL)
SELECT
    CASE WHEN status = 'running' AND clock.unix_s - heartbeat_unix_s > heartbeat_late_s THEN 'lost' ELSE status END AS status,
    status_reason,
    command, task, host, run.controller, seed,
    done.round, arm, round.decisions AS decision, horizon_decisions,
    done.decisions, planned_decisions, 1.0 * done.decisions / planned_decisions AS progress_share,
    heartbeat_unix_s - run.started_unix_s AS elapsed_s,
    done.decisions / (heartbeat_unix_s - run.started_unix_s) AS decisions_per_s,
    CASE WHEN status = 'running' THEN
        (planned_decisions - done.decisions) * (heartbeat_unix_s - run.started_unix_s) / done.decisions END AS left_s,
    train_loss_nats, val_loss_nats, val_accuracy,
    result.accuracy AS test_accuracy, result.loss_nats AS test_loss_nats, result.parameters AS parameters,
    (SELECT count(*) FROM incident WHERE closed_unix_s IS NULL) AS open_incidents,
    clock.unix_s - heartbeat_unix_s AS heartbeat_age_s,
    clock.unix_s - run.started_unix_s AS age_s
FROM run, clock, done, result LEFT JOIN round ON round.round = done.round
