-- Is the record complete and plausible?
-- `healthy`: 1 yes, 0 no, NULL nothing to judge by.
WITH decisions AS (
    SELECT count(*) AS recorded, count(val_loss_nats) AS measured, count(reward) AS rewarded,
        sum(skipped_updates) AS skipped FROM decision),
made AS (SELECT sum(decisions * rows) AS decisions, sum(ended_unix_s IS NULL) AS unfinished FROM round),
chain AS (
    SELECT before, lag(after) OVER (PARTITION BY row, slot ORDER BY decision, step) AS earlier
    FROM transition WHERE round = (SELECT max(round) FROM transition)),
last_seeds AS (
    SELECT count(*) AS blended, count(contribution_nats) AS measured FROM slot JOIN round
    ON slot.round = round.round AND slot.decision = round.decisions - 1
    WHERE round.round = (SELECT max(round) FROM round) AND alpha > 0)
SELECT 'decisions recorded' AS what, recorded AS value, 'decisions' AS unit,
    iif(level = 'full', recorded = decisions, NULL) AS healthy FROM run, decisions, made
UNION ALL SELECT 'decisions made', decisions, 'decisions', NULL FROM made
UNION ALL SELECT 'decisions without a validation loss', recorded - measured, 'decisions',
    iif(recorded > 0, measured = recorded, NULL) FROM decisions
UNION ALL SELECT 'updates skipped, their gradient not finite', skipped, 'updates', NULL FROM decisions
UNION ALL SELECT 'failures of hosts', count(*), 'failures', NULL FROM failure
UNION ALL SELECT 'decisions with a reward', rewarded, 'decisions', NULL FROM decisions
UNION ALL SELECT 'transitions of the last round that do not follow on the one before', count(*), 'transitions', count(*) = 0
    FROM chain WHERE earlier IS NOT before AND earlier IS NOT NULL
UNION ALL SELECT 'blended seeds without a contribution, last decision', blended - measured, 'seeds',
    iif(blended > 0, measured = blended, NULL) FROM last_seeds
UNION ALL SELECT 'rounds without an end', unfinished, 'rounds', iif(status = 'finished', unfinished = 0, NULL) FROM run, made
UNION ALL SELECT 'waits for a full buffer', stalls, 'waits', stalls = 0 FROM run
UNION ALL SELECT 'time waited for a full buffer', stall_s, 's', stall_s <= 0.01 * (heartbeat_unix_s - started_unix_s) FROM run
UNION ALL SELECT 'writer, of the wall time', (SELECT sum(wall_s) FROM timing WHERE phase = 'write') / (heartbeat_unix_s - started_unix_s),
    'share', NULL FROM run
UNION ALL SELECT 'longest silence', max(silence), 's', max(silence) <= max(heartbeat_late_s) FROM run, (
    SELECT unix_s - lag(unix_s) OVER (ORDER BY unix_s) AS silence FROM timing WHERE phase = 'write')
