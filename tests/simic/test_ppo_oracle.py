"""What an update computes, against torchrl's ClipPPOLoss and plain formulas in float64."""

import importlib
import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor, nn

from esper.leyline.actions import HEADS_OF_OP, Head, Op
from esper.leyline.config import PPOConfig
from esper.simic.ppo import PPOAgent, UpdateReport
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.network import OP_PRIOR, Evaluation
from helpers.rollouts import Policy, moved, normalised, plain_advantages, random_rollout, small_policy

FAR = 1e9
"""A limit that is never reached."""
LENGTHS = [6, 4, 6, 0, 2, 6, 5, 6, 6, 1]


def config_of(**changes: object) -> PPOConfig:
    """One step of nothing but the policy's loss, unless told otherwise."""
    plain = {"epochs": 1, "minibatches": 1, "target_kl": FAR, "policy_clip_norm": FAR, "gamma": 0.99}
    return PPOConfig(**{**plain, "value_weight": 0.0, "entropy_weight": 0.0, **changes})


def stale(seed: int = 0, by: float = 0.05, **how: object) -> tuple[Policy, Rollout]:
    """A round, and a policy that has moved on since: ratios on both sides of the clip."""
    policy = small_policy(seed)
    rollout = random_rollout(policy, rows=len(LENGTHS), seed=seed, lengths=LENGTHS, **how)
    return moved(policy, seed, by), rollout


def evaluated(policy: Policy, rollout: Rollout) -> Evaluation:
    """What the policy says of the whole round now."""
    every = torch.arange(rollout.made_TR.shape[1])
    share = rollout.uniform_share
    return policy.evaluate_actions(
        rollout.observation(every), rollout.action_TRH, rollout.mask_TRHC, uniform_share=share
    )


def judged(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values now."""
    told = evaluated(policy, rollout)
    return told.log_prob_TRH, told.entropy_TRH, told.value_TR


def stepped(policy: Policy, rollout: Rollout, config: PPOConfig) -> tuple[UpdateReport, dict[str, Tensor]]:
    """Report and gradients of an update of one step."""
    report = PPOAgent(policy, config, 0).update(rollout)
    return report, gradients(policy)


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


def gradients_of(policy: Policy, loss: Tensor) -> dict[str, Tensor]:
    policy.zero_grad(set_to_none=True)
    loss.backward()
    return gradients(policy)


def assert_same_gradients(told: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert expected
    for name in told | expected:
        one, other = (side.get(name, torch.zeros(())) for side in (told, expected))
        one, other = torch.broadcast_tensors(one, other)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


class Told(torch.distributions.Distribution):
    """Knows the log-probability of what was done, and nothing else."""

    def __init__(self, told: Tensor) -> None:
        self.told = told
        super().__init__(validate_args=False)

    def log_prob(self, action: Tensor) -> Tensor:
        return self.told


class Joint(nn.Module):
    """Joint log-probability of every recorded action, [N]."""

    def __init__(self, policy: Policy, rollout: Rollout, kept: Tensor) -> None:
        super().__init__()
        self.policy, self.rollout, self.kept = policy, rollout, kept

    def forward(self, _: Tensor) -> Tensor:
        return judged(self.policy, self.rollout)[0].sum(-1)[self.kept]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clip", [0.1, 0.2])
def test_loss_clipping_and_gradient_are_those_of_torchrl(seed: int, clip: float) -> None:
    objectives = importlib.import_module("torchrl.objectives")
    (policy, rollout), config = stale(seed), config_of(clip=clip)
    kept = rollout.free_TR
    network = TensorDictModule(Joint(policy, rollout, kept), in_keys=["number"], out_keys=["told"])
    drawn = ProbabilisticTensorDictModule(
        in_keys=["told"], out_keys=["action"], distribution_class=Told, return_log_prob=True
    )
    loss = objectives.ClipPPOLoss(
        ProbabilisticTensorDictSequential(network, drawn),
        None,
        clip_epsilon=clip,
        entropy_bonus=False,
        functional=False,
    )
    loss.set_keys(sample_log_prob="before")
    advantage = normalised(plain_advantages(rollout, 0.99, 0.97), kept)[kept].float()
    number = int(kept.sum())
    batch = TensorDict(
        {
            "number": torch.arange(number),
            "action": torch.zeros(number),
            "before": rollout.log_prob_TRH.sum(-1)[kept],
            "advantage": advantage[:, None],
        },
        [number],
    )
    theirs = loss(batch)
    expected = gradients_of(policy, theirs["loss_objective"])
    report, told = stepped(policy, rollout, config)
    assert report.policy_loss == pytest.approx(float(theirs["loss_objective"].detach()), rel=1e-4, abs=1e-6)
    assert report.clip_share == pytest.approx(float(theirs["clip_fraction"]), abs=1e-6)
    assert 0 < report.clip_share < 1
    assert_same_gradients(told, expected)


def choices_of(rollout: Rollout) -> Tensor:
    return (rollout.mask_TRHC.sum(-1) > 1) & rollout.made_TR[..., None]


def surrogate(log_prob: Tensor, rollout: Rollout, config: PPOConfig) -> tuple[Tensor, float]:
    """Loss and share of clipped decisions, one decision after another."""
    advantage = normalised(plain_advantages(rollout, config.gamma, config.gae_lambda), rollout.free_TR)
    choice, total, clipped = choices_of(rollout), torch.zeros((), dtype=torch.float64), 0
    for t, row in rollout.free_TR.nonzero().tolist():
        change = (log_prob[t, row] - rollout.log_prob_TRH[t, row]).double()
        parts = [change.sum()] if config.ratio == "joint" else list(change[choice[t, row]])
        a = float(advantage[t, row])
        for part in parts:
            ratio = part.exp()
            total = total - torch.minimum(ratio * a, ratio.clamp(1 - config.clip, 1 + config.clip) * a)
        clipped += any(abs(float(part.detach().exp()) - 1) > config.clip for part in parts)
    number = int(rollout.free_TR.sum())
    return total / number, clipped / number


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", ["joint", "per-head"])
def test_loss_clipping_and_gradient_are_those_of_the_formula(seed: int, ratio: str) -> None:
    policy, rollout = stale(seed)
    config = config_of(ratio=ratio, clip=0.1)
    loss, clipped = surrogate(judged(policy, rollout)[0], rollout, config)
    expected = gradients_of(policy, loss)
    report, told = stepped(policy, rollout, config)
    assert report.policy_loss == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert report.clip_share == pytest.approx(clipped, abs=1e-6)
    assert 0 < clipped < 1
    assert_same_gradients(told, expected)


def test_joint_and_per_head_ratios_differ() -> None:
    losses = []
    for ratio in ("joint", "per-head"):
        policy, rollout = stale()
        losses.append(stepped(policy, rollout, config_of(ratio=ratio, clip=0.1))[0].policy_loss)
    assert abs(losses[0] - losses[1]) > 1e-3


def distance_to_a_new_policy(policy: Policy, rollout: Rollout) -> Tensor:
    """KL divergence [T, R] of the operation to that of a new policy, over ln of the choices: torch's own."""
    mask_TRO = rollout.mask_TRHC[..., Head.OP, : len(Op)]
    every = torch.arange(mask_TRO.shape[1])
    seen, kept = [], policy.op_head.register_forward_hook(lambda module, given, logits: seen.append(logits))
    policy.evaluate_actions(rollout.observation(every), rollout.action_TRH, rollout.mask_TRHC)
    kept.remove()
    prior_O = torch.tensor([OP_PRIOR.get(op, 0.0) for op in Op])
    share = rollout.uniform_share
    now_TRO = seen[0].double().masked_fill(~mask_TRO, -torch.inf).softmax(-1)
    uniform_TRO = mask_TRO / mask_TRO.sum(-1, keepdim=True)
    now_TRO = torch.where(mask_TRO.sum(-1, keepdim=True) > 1, (1 - share) * now_TRO + share * uniform_TRO, now_TRO)
    new_TRO = prior_O.double().masked_fill(~mask_TRO, -1e9).softmax(-1)
    between_TR = torch.distributions.kl_divergence(
        torch.distributions.Categorical(probs=now_TRO), torch.distributions.Categorical(probs=new_TRO)
    )
    return between_TR / mask_TRO.sum(-1).clamp_min(2).log()


def test_a_new_policy_is_as_free_in_its_operation_as_can_be() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    gradients = gradients_of(policy, evaluated(policy, rollout).freedom_TRH[..., Head.OP].sum())
    entropies = gradients_of(policy, evaluated(policy, rollout).entropy_TRH[..., Head.OP].sum())
    # Not exactly: its weights are small, not 0. Towards a uniform choice the pull would be strong.
    assert gradients["op_head.bias"].abs().max() < 0.02 * entropies["op_head.bias"].abs().max()


@pytest.mark.parametrize("seed", range(2))
def test_the_whole_loss_is_the_sum_of_its_parts(seed: int) -> None:
    policy, rollout = stale(seed, uniform_share=0.1)
    config = config_of(value_weight=0.7, entropy_weight=0.3, clip=0.1)
    target = plain_advantages(rollout, 0.99, 0.97) + rollout.value_TR.double()
    deviation = target[rollout.made_TR].std(correction=0)
    # The weights of the value's last layer follow its unit before the step; so must the formula.
    policy.value_output.track(target.float(), rollout.made_TR)
    log_prob, entropy, value = judged(policy, rollout)
    policy_loss = surrogate(log_prob, rollout, config)[0]
    value_loss = 0.5 * ((value - target) / deviation)[rollout.made_TR].square().mean()
    mean_entropy = entropy[choices_of(rollout)].mean()
    # Towards uniform choices everywhere, but for the operation towards what a new policy does.
    distance_TR = distance_to_a_new_policy(policy, rollout)
    freedom = entropy.double()
    freedom[..., Head.OP] = -distance_TR
    expected = gradients_of(policy, policy_loss + 0.7 * value_loss - 0.3 * freedom[choices_of(rollout)].mean())
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    report, told = stepped(policy, rollout, config)
    assert report.policy_loss == pytest.approx(float(policy_loss.detach()), rel=1e-3, abs=1e-5)
    assert report.value_loss == pytest.approx(float(value_loss.detach()), rel=1e-3)
    assert report.entropy == pytest.approx(float(mean_entropy.detach()), rel=1e-4)
    assert report.gradient_norm == pytest.approx(norm, rel=1e-3)
    assert_same_gradients(told, expected)


@pytest.mark.parametrize("lengths", [LENGTHS, [6] * 10])
def test_advantages_of_a_group_take_the_place_of_the_critic(lengths: list[int]) -> None:
    policy, group, learners = small_policy(), [0, 0, 2, 2, 2, 5, 5, 7, 5, 5], [0, 1, 2, 3, 4, 5, 7, 8, 9]
    rollout = random_rollout(policy, rows=10, lengths=lengths, group=group, learners=learners)
    moved(policy, by=0.05)
    returns = plain_advantages(rollout, 0.99, 1.0, critic=False)[0]
    counts = [row in learners and lengths[row] > 0 for row in range(10)]
    expected = torch.zeros(10, dtype=torch.float64)
    for row in range(10):
        others = [float(returns[o]) for o in range(10) if o != row and counts[o] and group[o] == group[row]]
        if counts[row] and others:
            expected[row] = returns[row] - sum(others) / len(others)
    advantage = normalised(expected.expand(6, 10), rollout.free_TR)
    ratio = (judged(policy, rollout)[0] - rollout.log_prob_TRH).sum(-1).double().exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    loss = -gain[rollout.free_TR].mean()
    wanted = gradients_of(policy, loss)
    report, told = stepped(policy, rollout, config_of(advantage="group"))
    assert report.policy_loss == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert_same_gradients(told, wanted)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_explained_variance_is_numpys(gamma: float) -> None:
    policy = small_policy()
    rollout = random_rollout(policy, rows=10, lengths=LENGTHS, learners=[0, 1, 2, 3, 4, 5, 6, 7])
    returns = plain_advantages(rollout, gamma, 1.0, critic=False)
    # A critic that knows something.
    rollout.value_TR += 0.8 * returns.float()
    kept = (rollout.made_TR & rollout.learns_R).numpy()
    told, known = returns.numpy()[kept], rollout.value_TR.double().numpy()[kept]
    expected = 1 - np.var(told - known) / np.var(told)
    report = PPOAgent(policy, config_of(gamma=gamma), 0).update(rollout)
    assert report.explained_variance == pytest.approx(expected, rel=1e-4)
    assert 0.3 < expected < 1


def test_each_head_is_reported_by_plain_loops() -> None:
    policy, rollout = stale(learners=[0, 1, 2, 3, 4, 6, 7, 9])
    log_prob, entropy, _ = (x.detach().double() for x in judged(policy, rollout))
    report, _ = stepped(policy, rollout, config_of())
    learned = [(t, row) for t in range(6) for row in (0, 1, 2, 3, 4, 6, 7, 9) if t < LENGTHS[row]]
    free = [(t, row) for t, row in learned if (rollout.mask_TRHC[t, row].sum(-1) > 1).any()]
    assert 0 < len(free) < len(learned)
    assert set(report.heads) == {head.name.lower() for head in Head}
    for head in Head:
        ours = report.heads[head.name.lower()]
        used = [at for at in learned if head in HEADS_OF_OP[Op(int(rollout.action_TRH[at][Head.OP]))]]
        choice = [at for at in learned if rollout.mask_TRHC[at][head].sum() > 1]
        assert (ours.used_decisions, ours.choice_decisions) == (len(used), len(choice))
        assert set(choice) <= set(used)
        if choice:
            assert ours.entropy == pytest.approx(np.mean([float(entropy[at][head]) for at in choice]), rel=1e-4)
        else:
            assert math.isnan(ours.entropy)
        changes = [float(log_prob[at][head] - rollout.log_prob_TRH[at][head]) for at in free]
        assert ours.kl_nats == pytest.approx(np.mean([math.expm1(x) - x for x in changes]), rel=1e-3, abs=1e-6)
    changes = [float((log_prob[at] - rollout.log_prob_TRH[at]).sum()) for at in free]
    assert report.kl_nats == pytest.approx(np.mean([math.expm1(x) - x for x in changes]), rel=1e-3, abs=1e-6)


def test_the_report_is_of_the_last_pass_and_its_heads_of_all_its_minibatches() -> None:
    policy = small_policy()
    rollout = random_rollout(policy, rows=10, lengths=LENGTHS)
    one = PPOAgent(policy, config_of(epochs=3, minibatches=4), 0).update(rollout)
    assert (one.epochs, one.minibatches, one.skipped_minibatches, one.stopped_early) == (3, 12, 0, False)
    choices = choices_of(rollout).sum((0, 1))
    for head in Head:
        assert one.heads[head.name.lower()].choice_decisions == int(choices[head])
