-- What happened, when, and why?
-- Every transition asked for or made by the clock, the governor or the end of the episode, and every failure of a host,
-- which has no slot. `why`: the check that decided, with its value and limit.
WITH judged AS (
    SELECT t.*, meaning, iif(standard_errors IS NULL, limit_value, limit_nats) AS bound, CASE quantity
        WHEN 'host_loss_nats' THEN host_loss_nats WHEN 'training_decisions' THEN training_decisions
        WHEN 'gradient_norm' THEN gradient_norm WHEN 'gradient_ratio' THEN gradient_ratio
        WHEN 'incubator_gain_nats' THEN incubator_gain_nats WHEN 'alpha_distance' THEN alpha_distance
        WHEN 'probation_decisions' THEN probation_decisions WHEN 'contribution_nats' THEN contribution_nats END AS seen
    FROM transition AS t LEFT JOIN gate_check AS g ON g.gate = t.gate AND check_name = coalesce(refused_by, CASE t.gate
        WHEN 'G1' THEN 'HOST_LOSS' WHEN 'G2' THEN 'INCUBATOR_GAIN' WHEN 'G3' THEN 'ALPHA_AT_TARGET' ELSE 'CONTRIBUTION' END))
SELECT round, arm, decision, row, slot, seed, blueprint, operator, actor, op, before, after, allowed, failed_checks, why
FROM (
    SELECT round, decision, row, step, slot, seed, blueprint, operator, actor, op, before, after, allowed, failed_checks,
        coalesce(reason, meaning || ' ' || iif(seen IS NULL, 'not measured', printf('%.4g', seen))
            || iif(bound IS NULL, '', printf(' (limit %.4g)', bound))) AS why
    FROM judged
    UNION ALL
    SELECT round, decision, row, 1000000, NULL, NULL, NULL, NULL, 'governor', 'rollback', NULL, NULL, 1, NULL,
        reason || iif(restored, printf('; it goes on with %g of its learning rate', learning_rate_share), '; it is over')
    FROM failure)
JOIN round USING (round) ORDER BY round, decision, row, step
