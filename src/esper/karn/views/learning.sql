-- Does it get better from round to round?
-- Means over the episodes of a round that is over. `net_nats`: by how much the loss fell below that of the twin, less rent.
SELECT
    e.round, purpose, arm, r.controller, count(*) AS episodes,
    avg(e.reward) AS reward,
    avg(t.val_loss_nats - e.val_loss_nats) AS gain_nats,
    avg(e.rent_nats) AS rent_nats,
    avg(t.val_loss_nats - e.val_loss_nats - e.rent_nats) AS net_nats,
    avg(e.val_loss_nats) AS val_loss_nats, avg(e.val_accuracy) AS val_accuracy,
    avg(e.test_loss_nats) AS test_loss_nats, avg(e.test_accuracy) AS test_accuracy,
    avg(e.host_parameters + e.added_parameters) AS parameters,
    avg(e.added_parameters) AS added_parameters,
    avg(e.committed_seeds) AS committed_seeds,
    entropy, kl_nats, explained_variance,
    r.ended_unix_s - r.started_unix_s AS wall_s
FROM round AS r JOIN episode AS e USING (round)
LEFT JOIN episode AS t ON t.round = e.twin_round AND t.row = e.twin_row
WHERE r.ended_unix_s IS NOT NULL GROUP BY e.round ORDER BY e.round
