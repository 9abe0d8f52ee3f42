-- Where in the policy network do gradients or activations go wrong?
-- With --record-layers: one line for each layer of each update, in the order in which the network was put together.
-- `gradient_share`: its part of the squared norm of the whole. `nonfinite` counts entries; NULL is not measured.
SELECT
    round, arm, layer, layer.gradient_norm,
    layer.gradient_norm * layer.gradient_norm
        / nullif(sum(layer.gradient_norm * layer.gradient_norm) OVER (PARTITION BY round), 0) AS gradient_share,
    gradient_largest, gradient_nonfinite, activation_mean, activation_deviation, activation_largest, activation_nonfinite
FROM layer JOIN round USING (round) ORDER BY round, position
