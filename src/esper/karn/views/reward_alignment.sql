-- Does the reward pay for what we want: lower loss than the twin, less rent?
-- Over the episodes of a round. `correlation_squared` keeps the sign of the correlation: 1 is perfect, below 0 it pays for harm.
WITH pair AS (
    SELECT e.round, e.reward AS x, t.val_loss_nats - e.val_loss_nats - e.rent_nats AS y
    FROM episode AS e JOIN episode AS t ON t.round = e.twin_round AND t.row = e.twin_row
    WHERE x IS NOT NULL AND y IS NOT NULL),
centre AS (
    SELECT round, count(*) AS episodes, avg(x) AS x, avg(y) AS y, min(x) < max(x) AND min(y) < max(y) AS varied
    FROM pair GROUP BY round),
moments AS (
    SELECT round, max(abs(p.x - p.y)) AS largest_difference, sum((p.x - c.x) * (p.y - c.y)) AS xy,
        sum((p.x - c.x) * (p.x - c.x)) AS xx, sum((p.y - c.y) * (p.y - c.y)) AS yy
    FROM pair AS p JOIN centre AS c USING (round) GROUP BY round)
SELECT
    round, arm, episodes, x AS reward, y AS net_nats, largest_difference,
    iif(varied, xy * abs(xy) / (xx * yy), NULL) AS correlation_squared
FROM centre JOIN moments USING (round) JOIN round USING (round) ORDER BY round
