-- What is the reward made of, and do its parts add up?
-- Means over the decisions of a round, in the unit of the reward; NULL: not part of it. `residual`: the largest difference
-- between a reward and the sum of its parts.
SELECT
    round, arm, count(reward) AS decisions, avg(reward) AS reward,
    avg(reward_gain) AS gain, avg(reward_rent) AS rent, avg(reward_own) AS own, avg(reward_shaping) AS shaping,
    avg(reward_attribution) AS attribution, avg(reward_escrow) AS escrow, avg(reward_drip) AS drip,
    avg(reward_sparse) AS sparse, avg(reward_intervention) AS intervention, avg(reward_penalty) AS penalty,
    max(abs(reward
        - coalesce(reward_gain, 0) - coalesce(reward_rent, 0) - coalesce(reward_own, 0)
        - coalesce(reward_shaping, 0) - coalesce(reward_attribution, 0) - coalesce(reward_escrow, 0)
        - coalesce(reward_drip, 0) - coalesce(reward_sparse, 0) - coalesce(reward_intervention, 0)
        - coalesce(reward_penalty, 0))) AS residual
FROM decision JOIN round USING (round) WHERE reward IS NOT NULL GROUP BY round ORDER BY round
