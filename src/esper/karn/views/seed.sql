-- What became of each seed, and what was it worth?
-- Decisions count from 0; NULL: it did not get there. `judged_nats`: contribution when it was committed or culled.
-- `contribution_nats`: when it was last measured (level full). `culled_by`: controller, clock (it faded out), governor, or
-- "end of episode": it was not committed by then. In the order of an index, so that the first rows come at once.
SELECT
    round, (SELECT arm FROM round WHERE round.round = life.round) AS arm, row, seed, slot, blueprint, operator,
    CASE WHEN culled_by = 'end of episode' THEN 'not committed' WHEN culled_by IS NOT NULL THEN 'culled' WHEN committed_decision IS NOT NULL THEN 'committed' ELSE 'alive' END AS fate,
    germinated_decision, blended_decision, committed_decision, culled_decision, culled_by,
    incubator_gain_nats, judged_nats,
    (SELECT contribution_nats FROM slot
        WHERE slot.round = life.round AND slot.row = life.row AND slot.slot = life.slot AND slot.seed = life.seed
        AND slot.decision = coalesce(culled_decision, (SELECT decisions FROM round WHERE round.round = life.round)) - 1
    ) AS contribution_nats,
    parameters, refusals
FROM (
    SELECT
        round, row, seed, slot, blueprint, operator,
        min(iif(op = 'germinate', decision, NULL)) AS germinated_decision,
        min(iif(before = 'TRAINING' AND after = 'BLENDING', decision, NULL)) AS blended_decision,
        min(iif(after = 'FOSSILIZED', decision, NULL)) AS committed_decision,
        min(iif(after = 'CULLED', decision, NULL)) AS culled_decision,
        min(iif(after = 'CULLED', actor, NULL)) AS culled_by,
        max(iif(before = 'TRAINING' AND after = 'BLENDING', incubator_gain_nats, NULL)) AS incubator_gain_nats,
        max(iif(after IN ('CULLED', 'FOSSILIZED') AND allowed, contribution_nats, NULL)) AS judged_nats,
        max(parameters) AS parameters, sum(NOT allowed) AS refusals
    FROM transition WHERE seed IS NOT NULL GROUP BY round, row, seed) AS life
