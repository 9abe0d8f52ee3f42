-- What is different in another run (--other)?
-- Settings, versions, machine and results that differ; NULL: not there.
WITH fact (side, what, value) AS (
    SELECT 1, 'setting ' || substr(fullkey, 3), atom FROM main.run, json_tree(main.run.config) WHERE atom IS NOT NULL
    UNION ALL
    SELECT 2, 'setting ' || substr(fullkey, 3), atom FROM other.run AS o, json_tree(o.config) WHERE atom IS NOT NULL
    UNION ALL SELECT 1, 'Esper version', esper_version FROM main.run
    UNION ALL SELECT 2, 'Esper version', esper_version FROM other.run
    UNION ALL SELECT 1, 'Python version', python_version FROM main.run
    UNION ALL SELECT 2, 'Python version', python_version FROM other.run
    UNION ALL SELECT 1, 'torch version', torch_version FROM main.run
    UNION ALL SELECT 2, 'torch version', torch_version FROM other.run
    UNION ALL SELECT 1, 'commit', commit_hash FROM main.run
    UNION ALL SELECT 2, 'commit', commit_hash FROM other.run
    UNION ALL SELECT 1, 'machine', machine FROM main.run
    UNION ALL SELECT 2, 'machine', machine FROM other.run
    UNION ALL SELECT 1, 'threads', threads FROM main.run
    UNION ALL SELECT 2, 'threads', threads FROM other.run
    UNION ALL SELECT 1, 'accelerator', accelerator FROM main.run
    UNION ALL SELECT 2, 'accelerator', accelerator FROM other.run
    UNION ALL SELECT 1, 'status', status FROM main.run
    UNION ALL SELECT 2, 'status', status FROM other.run
    UNION ALL SELECT 1, arm || ': test accuracy', avg(test_accuracy) FROM main.round JOIN main.episode USING (round) GROUP BY arm
    UNION ALL SELECT 2, arm || ': test accuracy', avg(test_accuracy) FROM other.round JOIN other.episode USING (round) GROUP BY arm
    UNION ALL SELECT 1, arm || ': validation loss (nats)', avg(e.val_loss_nats)
        FROM main.round JOIN main.episode AS e USING (round) GROUP BY arm
    UNION ALL SELECT 2, arm || ': validation loss (nats)', avg(e.val_loss_nats)
        FROM other.round JOIN other.episode AS e USING (round) GROUP BY arm
    UNION ALL SELECT 1, arm || ': parameters', avg(host_parameters + added_parameters)
        FROM main.round JOIN main.episode USING (round) GROUP BY arm
    UNION ALL SELECT 2, arm || ': parameters', avg(host_parameters + added_parameters)
        FROM other.round JOIN other.episode USING (round) GROUP BY arm)
SELECT what, max(iif(side = 1, value, NULL)) AS this, max(iif(side = 2, value, NULL)) AS other
FROM fact WHERE EXISTS (SELECT 1 FROM other.run)
GROUP BY what HAVING this IS NOT other ORDER BY what
