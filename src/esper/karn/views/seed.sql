-- What became of each seed, and what was it worth?
-- Decisions count from 0; NULL: it did not get there. `contribution_nats`: when it was last measured (level full).
WITH life AS (
    SELECT
        round, row, seed, slot, blueprint, operator,
        min(iif(op = 'germinate' AND allowed, decision, NULL)) AS germinated_decision,
        min(iif(before = 'TRAINING' AND after = 'BLENDING', decision, NULL)) AS blended_decision,
        min(iif(after = 'FOSSILIZED' AND allowed, decision, NULL)) AS committed_decision,
        min(iif(after = 'CULLED', decision, NULL)) AS culled_decision,
        max(iif(after IN ('CULLED', 'FOSSILIZED') AND allowed, contribution_nats, NULL)) AS contribution_judged_nats,
        max(iif(after = 'BLENDING' AND before = 'TRAINING', incubator_gain_nats, NULL)) AS incubator_gain_nats,
        sum(NOT allowed) AS refusals
    FROM transition WHERE seed IS NOT NULL GROUP BY round, row, seed)
SELECT
    life.round, arm, life.row, life.seed, life.slot, life.blueprint, life.operator,
    CASE WHEN committed_decision IS NOT NULL THEN 'committed' WHEN culled_decision IS NOT NULL THEN 'culled' ELSE 'alive' END AS fate,
    germinated_decision, blended_decision, committed_decision, culled_decision,
    coalesce(culled_decision, decisions - 1) - germinated_decision AS lived_decisions,
    life.incubator_gain_nats, contribution_judged_nats,
    slot.contribution_nats, slot.contribution_se_nats, slot.parameters, refusals
FROM life JOIN round USING (round)
LEFT JOIN slot ON slot.round = life.round AND slot.decision = coalesce(culled_decision, decisions) - 1
    AND slot.row = life.row AND slot.slot = life.slot AND slot.seed = life.seed
ORDER BY life.round, life.row, life.seed
