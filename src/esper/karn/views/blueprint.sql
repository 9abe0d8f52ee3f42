-- Which blueprints are worth growing?
-- Seeds of an arm that got so far: every seed passes each of these events at most once. `not_committed`: culled because
-- the episode was over.
SELECT
    arm, blueprint,
    sum(op = 'germinate' AND allowed) AS germinated,
    sum(before = 'TRAINING' AND after = 'BLENDING') AS blended,
    sum(after = 'FOSSILIZED' AND allowed) AS committed,
    sum(after = 'CULLED' AND actor <> 'end of episode') AS culled,
    sum(after = 'CULLED' AND actor = 'end of episode') AS not_committed,
    1.0 * sum(after = 'FOSSILIZED' AND allowed) / nullif(sum(op = 'germinate' AND allowed), 0) AS committed_share,
    avg(iif(before = 'TRAINING' AND after = 'BLENDING', incubator_gain_nats, NULL)) AS incubator_gain_nats,
    avg(iif(after = 'FOSSILIZED' AND allowed, contribution_nats, NULL)) AS committed_contribution_nats,
    avg(iif(op = 'germinate' AND allowed, parameters, NULL)) AS parameters
FROM transition JOIN round USING (round) WHERE blueprint IS NOT NULL
GROUP BY arm, blueprint ORDER BY arm, germinated DESC, blueprint
