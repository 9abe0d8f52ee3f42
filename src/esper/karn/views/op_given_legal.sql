-- How often is each operation chosen where it is possible?
-- By round. `p_chosen`: mean probability that the controller gave it where it chose it.
WITH op (bit, op) AS (
    VALUES (1, 'wait'), (2, 'germinate'), (4, 'set_alpha_target'), (8, 'cull'), (16, 'fossilize'), (32, 'advance')),
counted AS MATERIALIZED (
    SELECT round, legal_ops, op, count(*) AS decisions, sum(p_op) AS p, count(p_op) AS scored, sum(accepted) AS accepted
    FROM decision GROUP BY round, legal_ops, op)
SELECT
    round, arm, op.op,
    sum(counted.decisions) AS legal_decisions,
    sum(iif(counted.op = op.op, counted.decisions, 0)) AS chosen_decisions,
    1.0 * sum(iif(counted.op = op.op, counted.decisions, 0)) / sum(counted.decisions) AS chosen_share,
    1.0 * sum(iif(counted.op = op.op, accepted, 0))
        / nullif(sum(iif(counted.op = op.op, counted.decisions, 0)), 0) AS accepted_share,
    sum(iif(counted.op = op.op, p, NULL)) / nullif(sum(iif(counted.op = op.op, scored, 0)), 0) AS p_chosen
FROM counted JOIN op ON legal_ops & bit JOIN round USING (round) GROUP BY round, bit ORDER BY round, bit
