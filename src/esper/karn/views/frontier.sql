-- What does quality cost?
-- By arm and price, means over finished episodes; on the test split where it was touched, else on reward-validation.
-- `on_frontier`: no other line is at least as accurate with at most as many parameters and better in one of them.
WITH point AS (
    SELECT
        arm, price_nats, count(*) AS episodes,
        iif(count(test_accuracy) = count(*), 'test', 'validation') AS split,
        iif(count(test_accuracy) = count(*), avg(test_accuracy), avg(e.val_accuracy)) AS accuracy,
        avg(host_parameters + added_parameters) AS parameters,
        avg(host_multiply_adds + added_multiply_adds) AS multiply_adds,
        avg(training_s) AS training_s
    FROM episode AS e JOIN round USING (round) WHERE status = 'finished' GROUP BY arm, price_nats)
SELECT *, NOT EXISTS (
    SELECT 1 FROM point AS better WHERE better.split = point.split
    AND better.accuracy >= point.accuracy AND better.parameters <= point.parameters
    AND (better.accuracy > point.accuracy OR better.parameters < point.parameters)) AS on_frontier
FROM point ORDER BY parameters, accuracy
