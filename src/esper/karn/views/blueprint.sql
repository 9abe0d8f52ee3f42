-- Which blueprints are worth growing?
-- Of all seeds of an arm: how many got how far, and what the committed ones contributed when they were committed.
SELECT
    arm, blueprint, count(*) AS germinated,
    count(blended_decision) AS blended, count(committed_decision) AS committed,
    sum(fate = 'culled') AS culled, sum(fate = 'alive') AS alive,
    1.0 * count(committed_decision) / count(*) AS committed_share,
    avg(incubator_gain_nats) AS incubator_gain_nats,
    avg(iif(fate = 'committed', contribution_judged_nats, NULL)) AS committed_contribution_nats,
    avg(parameters) AS parameters,
    avg(lived_decisions) AS lived_decisions
FROM seed GROUP BY arm, blueprint ORDER BY arm, germinated DESC, blueprint
