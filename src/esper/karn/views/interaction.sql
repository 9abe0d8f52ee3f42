-- Which seeds need each other, and which do the same?
-- `interaction_nats`: what two seeds give together, less what each gives alone; above 0 they need each other, below 0 they
-- do the same.
WITH RECURSIVE place (slot, bit) AS (VALUES (0, 1) UNION ALL SELECT slot + 1, bit * 2 FROM place WHERE slot < 62),
alone AS (
    SELECT c.round, c.decision, c.row, c.coalition, slot, none.loss_nats AS none_nats, none.loss_nats - c.loss_nats AS gain_nats
    FROM contribution AS c JOIN place ON c.coalition = bit JOIN contribution AS none
    ON none.round = c.round AND none.decision = c.decision AND none.row = c.row AND none.coalition = 0)
SELECT
    a.round, arm, a.decision, a.row, a.slot AS slot_a, b.slot AS slot_b,
    a.gain_nats AS alone_a_nats, b.gain_nats AS alone_b_nats,
    a.none_nats - ab.loss_nats AS together_nats,
    a.none_nats - ab.loss_nats - a.gain_nats - b.gain_nats AS interaction_nats
FROM alone AS a JOIN alone AS b USING (round, decision, row)
JOIN contribution AS ab ON ab.round = a.round AND ab.decision = a.decision AND ab.row = a.row
    AND ab.coalition = a.coalition | b.coalition
JOIN round ON round.round = a.round
WHERE a.slot < b.slot ORDER BY a.round, a.decision, a.row, a.slot, b.slot
