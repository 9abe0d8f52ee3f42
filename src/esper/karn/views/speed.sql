-- Where does the time go?
-- By arm and phase. `share`: of the wall time of the phases that the run itself goes through; `write` is another thread.
WITH phase AS (
    SELECT arm, phase, sum(timing.decisions) AS decisions, sum(wall_s) AS wall_s, sum(cpu_s) AS cpu_s
    FROM timing JOIN round USING (round) GROUP BY arm, phase),
arm AS (SELECT arm, sum(wall_s) AS wall_s FROM phase WHERE phase != 'write' GROUP BY arm)
SELECT
    arm, phase, phase.decisions, phase.wall_s, cpu_s, phase.wall_s / arm.wall_s AS share,
    phase.wall_s / nullif(phase.decisions, 0) AS decision_s
FROM phase JOIN arm USING (arm) ORDER BY arm, phase.wall_s DESC
