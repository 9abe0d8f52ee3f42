-- Does the reward pay for what we want: lower loss than the twin, less rent?
-- Over the episodes of a round. `correlation_squared` keeps the sign of the correlation: 1 is perfect, below 0 it pays for harm.
WITH pair AS (
    SELECT e.round, e.reward AS x, t.val_loss_nats - e.val_loss_nats - e.rent_nats AS y
    FROM episode AS e JOIN episode AS t ON t.round = e.twin_round AND t.row = e.twin_row
    WHERE x IS NOT NULL AND y IS NOT NULL),
moments AS (
    SELECT round, count(*) AS episodes, avg(x) AS reward, avg(y) AS net_nats, max(abs(x - y)) AS largest_difference,
        avg(x * y) - avg(x) * avg(y) AS xy, avg(x * x) - avg(x) * avg(x) AS xx, avg(y * y) - avg(y) * avg(y) AS yy
    FROM pair GROUP BY round)
SELECT
    round, arm, episodes, reward, net_nats, largest_difference,
    iif(xx > 0 AND yy > 0, xy * abs(xy) / (xx * yy), NULL) AS correlation_squared
FROM moments JOIN round USING (round) ORDER BY round
