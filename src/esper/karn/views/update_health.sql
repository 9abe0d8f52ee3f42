-- Is the policy learning in a healthy way?
-- One line for each policy update, with the incidents about updates that were open when it was judged.
SELECT
    round, arm, kl_nats, clip_share, entropy, explained_variance, policy_loss, value_loss, gradient_norm,
    epochs, minibatches, skipped_minibatches, stopped_early, policy_learning_rate, update_s,
    (SELECT group_concat(kind, ', ') FROM incident
        WHERE kind IN ('policy_frozen', 'policy_violent', 'critic_useless', 'update_skipped') AND subject = arm
        AND opened_round <= round.round AND coalesce(closed_round > round.round, 1)) AS incidents
FROM round WHERE update_s IS NOT NULL ORDER BY round
