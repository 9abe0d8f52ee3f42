-- Which heads of the policy still choose?
-- `choice_share`: of the decisions that used the head, those with more than one legal choice. An entropy of 1 is uniform.
SELECT
    round, arm, head, used_decisions, choice_decisions,
    1.0 * choice_decisions / nullif(used_decisions, 0) AS choice_share,
    head.entropy, head.kl_nats, head.gradient_norm
FROM head JOIN round USING (round) ORDER BY round, head
