"""PPO from outside: scales, rates, precision, repetition, transfers, and that something is learned."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op
from esper.leyline.config import PPOConfig
from esper.leyline.slots import SlotTensors
from esper.simic.ppo import PPOAgent
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.network import REST_SIZES, Decision
from helpers.rollouts import Policy, moved, random_observation, random_rollout, seeded, small_policy, valuing

FAR = 1e9
MANY = 256
"""Rows enough for every operation to be chosen, however seldom a new policy does."""
READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")
LENGTHS = [6, 4, 6, 0, 2, 6, 5, 3]


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


@pytest.mark.parametrize("factor", [1000.0, 0.01])
def test_the_scale_of_the_rewards_does_not_matter(factor: float) -> None:
    """A critic that already knows the scale, two updates; its layer that knows the unit included."""
    policies = []
    for scale in (1.0, factor):
        policy, targets = small_policy(), torch.randn(200, generator=seeded(1))
        output = policy.value_output
        fresh = [p.detach().clone() for p in output.linear.parameters()]
        output.track(targets * scale, torch.ones(200, dtype=torch.bool))
        with torch.no_grad():
            for parameter, value in zip(output.linear.parameters(), fresh, strict=True):
                parameter.copy_(value)
        rollout = random_rollout(policy, lengths=LENGTHS)
        rollout.reward_TR *= scale
        agent = PPOAgent(policy, PPOConfig(epochs=2, minibatches=2, target_kl=FAR), 0)
        for _ in range(2):
            agent.update(rollout)
        policies.append(policy)
    one, other = (weights(policy) for policy in policies)
    for name, kept in one.items():
        torch.testing.assert_close(kept, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    mean, deviation = ([float(getattr(p.value_output, n)) for p in policies] for n in ("mean", "deviation"))
    assert mean[1] == pytest.approx(factor * mean[0], rel=1e-3)
    assert deviation[1] == pytest.approx(factor * deviation[0], rel=1e-3)


def test_progress_moves_the_rate_linearly() -> None:
    agent = PPOAgent(small_policy(), PPOConfig(policy_rate=2e-3, policy_final_share=0.25), 0)
    rates = []
    for share in (0.0, 0.5, 1.0, 0.0):
        agent.set_progress(share)
        rates += [group["lr"] for group in agent.optimizer.param_groups]
    assert rates == pytest.approx([2e-3, 1.25e-3, 0.5e-3, 2e-3])


def test_exploration_falls_to_nothing() -> None:
    agent = PPOAgent(small_policy(), PPOConfig(uniform_share=0.1), 0)
    shares = [agent.uniform_share]
    for share in (0.0, 0.5, 1.0):
        agent.set_progress(share)
        shares.append(agent.uniform_share)
    assert shares == pytest.approx([0.1, 0.1, 0.05, 0.0])


def test_the_rate_is_what_a_step_is_as_long_as() -> None:
    """Adam's first step is as long as the rate, wherever there is a gradient."""
    for share, rate in ((0.0, 1e-3), (1.0, 1e-4)):
        policy = small_policy()
        agent = PPOAgent(policy, PPOConfig(epochs=1, minibatches=1, policy_clip_norm=FAR, policy_rate=1e-3), 0)
        agent.set_progress(share)
        rollout = random_rollout(policy)
        before = weights(policy)["op_head.weight"]
        agent.update(rollout)
        moved = (weights(policy)["op_head.weight"] - before).abs().max()
        assert float(moved) == pytest.approx(rate, rel=0.05)


def test_the_entropy_counts_for_less_towards_the_end() -> None:
    """Where nothing is paid and the critic does not count, entropy is all that has a gradient."""
    norms = []
    for share in (0.0, 0.5, 1.0):
        policy = moved(small_policy())
        config = PPOConfig(epochs=1, minibatches=1, value_weight=0, entropy_weight=0.3, entropy_final_share=0.1)
        agent = PPOAgent(policy, config, 0)
        agent.set_progress(share)
        rollout = random_rollout(policy)
        rollout.reward_TR.zero_()
        rollout.value_TR.zero_()
        norms.append(agent.update(rollout).gradient_norm)
    # 0.3 at the start, a tenth of it at the end.
    assert norms[1:] == pytest.approx([norms[0] * 0.55, norms[0] * 0.1], rel=1e-3)
    assert norms[0] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_arithmetic_of_the_distribution_stays_float32(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    policy, seen = valuing(small_policy()), []
    whole = policy.evaluate_actions

    def evaluate(*args, **how):
        told = whole(*args, **how)
        told_of = told.log_prob_TRH, told.entropy_TRH, told.freedom_TRH, told.value_TR
        seen.append([tensor.dtype for tensor in told_of])
        return told

    monkeypatch.setattr(policy, "evaluate_actions", evaluate)
    with torch.autocast("cpu", dtype=dtype):
        rollout = random_rollout(policy, rows=MANY)
        report = PPOAgent(policy, PPOConfig(epochs=1, minibatches=1, policy_clip_norm=FAR), 0).update(rollout)
    assert seen == [[torch.float32] * 4]
    assert (report.minibatches, report.skipped_minibatches) == (1, 0)
    assert report.kl_nats < 1e-4
    assert all(head.choice_decisions for head in report.heads.values()), "all heads were used"
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad != 0).any(), name
    for part in policy.rest_head.weight.grad.split(REST_SIZES):
        assert (part != 0).any()


@pytest.mark.parametrize("ratio", ["joint", "per-head"])
def test_gradients_reach_every_head(ratio: str) -> None:
    policy = valuing(small_policy())
    rollout = random_rollout(policy, rows=MANY)
    PPOAgent(policy, PPOConfig(epochs=1, minibatches=1, ratio=ratio, entropy_weight=0.0), 0).update(rollout)
    for name, parameter in policy.named_parameters():
        assert (parameter.grad != 0).any(), name
    for part in policy.rest_head.weight.grad.split(REST_SIZES):
        assert (part != 0).any()


def dealt(monkeypatch: pytest.MonkeyPatch, seed: int, updates: int = 2) -> tuple[list[list[int]], Policy]:
    """Rows of each minibatch, known by a mark, of some updates of 2 passes of 3."""
    policy, hands = small_policy(), []
    rollout = random_rollout(policy, rows=9, learners=[8, 0, 1, 2, 3, 5, 7])
    rollout.slot_TRSF[0, :, 0, 0] = torch.arange(9.0)
    whole = policy.evaluate_actions

    def evaluate(observation, *args, **how):
        hands.append(observation.slot_RSF[0, :, 0, 0].int().tolist())
        return whole(observation, *args, **how)

    monkeypatch.setattr(policy, "evaluate_actions", evaluate)
    agent = PPOAgent(policy, PPOConfig(epochs=2, minibatches=3, target_kl=FAR), seed)
    for _ in range(updates):
        agent.update(rollout)
    return hands, policy


def test_every_pass_deals_every_learner_once_and_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    hands, _ = dealt(monkeypatch, 5)
    assert len(hands) == 12
    passes = [[row for hand in hands[n : n + 3] for row in hand] for n in range(0, 12, 3)]
    assert all(sorted(each) == [0, 1, 2, 3, 5, 7, 8] for each in passes)
    assert len({tuple(each) for each in passes}) == 4, "other epochs and other updates deal differently"
    assert dealt(monkeypatch, 6)[0] != hands


def test_the_same_seed_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (hands, one), (again, other) = (dealt(monkeypatch, 5) for _ in range(2))
    assert hands == again
    state, theirs = one.state_dict(), other.state_dict()
    assert all(torch.equal(kept, theirs[name]) for name, kept in state.items())


def test_there_are_no_more_minibatches_than_learners() -> None:
    policy = small_policy()
    rollout = random_rollout(policy, learners=[2, 5])
    report = PPOAgent(policy, PPOConfig(epochs=3, minibatches=100, target_kl=FAR), 0).update(rollout)
    assert report.minibatches == 6


def test_torchs_generator_is_left_alone() -> None:
    policy = small_policy()
    rollout, before = random_rollout(policy), torch.get_rng_state()
    PPOAgent(policy, PPOConfig(), 0).update(rollout)
    assert torch.equal(torch.get_rng_state(), before)


# --- Transfers ---


def counting(patch: pytest.MonkeyPatch) -> list[str]:
    """Count every place where a tensor becomes a Python value."""
    reads: list[str] = []

    def counted(name, whole):
        def call(self, *args, **kwargs):
            reads.append(name)
            return whole(self, *args, **kwargs)

        return call

    for name in READS:
        patch.setattr(Tensor, name, counted(name, getattr(Tensor, name)))
    return reads


@pytest.mark.parametrize(
    "changes",
    [{}, {"epochs": 1, "minibatches": 1}, {"ratio": "per-head", "advantage": "group"}, {"record_layers": True}],
)
@pytest.mark.parametrize("limit", [1e-9, FAR])
def test_one_transfer_for_each_update(monkeypatch: pytest.MonkeyPatch, changes, limit: float) -> None:
    policy = small_policy()
    rollout = random_rollout(policy, lengths=LENGTHS)
    agent = PPOAgent(policy, PPOConfig(**{"epochs": 3, "target_kl": limit, **changes}), 0)
    for _ in range(2):
        with monkeypatch.context() as patch:
            reads = counting(patch)
            agent.update(rollout)
        # What follows the transfer is on the host: each name of the cargo is one array.
        assert reads[0] == "cpu"
        assert set(reads[1:]) == {"numpy"}


class Waiting(TorchDispatchMode):
    """Operations for which the host must wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        boolean = "aten.index" in name and any(
            place is not None and place.dtype in (torch.bool, torch.uint8)
            for places in args[1:2]
            if isinstance(places, (list, tuple))
            for place in places
        )
        if boolean or any(word in name for word in ("nonzero", "masked_select", "unique", "_local_scalar_dense")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("record_layers", [False, True])
def test_no_operation_needs_a_number_from_the_device(record_layers: bool) -> None:
    """A boolean index has a size that only the device knows: on a GPU each is a transfer of its own."""
    policy = small_policy()
    rollout = random_rollout(policy, lengths=LENGTHS)
    agent = PPOAgent(policy, PPOConfig(target_kl=FAR, record_layers=record_layers), 0)
    with Waiting() as waiting:
        agent.update(rollout)
    assert waiting.found == []


# --- Something simple is learned ---


def empty_slots(rows: int, slots: int) -> ActionMasks:
    """Nothing but to wait or to germinate."""
    fits_SB = torch.ones(slots, len(Blueprint), dtype=torch.bool)
    fits_SB[:, Blueprint.NOOP] = False
    return compute_batch_masks(SlotTensors.empty(rows, slots), ActionMasks.empty(rows, fits_SB))


def germinates(made: Decision) -> Tensor:
    return (made.action_RH[:, Head.OP] == int(Op.GERMINATE)).float()


def waits(made: Decision) -> Tensor:
    return 1 - germinates(made)


def norms(made: Decision) -> Tensor:
    return germinates(made) * (made.action_RH[:, Head.BLUEPRINT] == int(Blueprint.NORM))


@pytest.mark.parametrize(
    ("paid", "changes", "updates"),
    [
        (germinates, {}, 15),
        (germinates, {"ratio": "per-head"}, 15),
        (germinates, {"advantage": "group"}, 15),
        (waits, {}, 15),
        (norms, {}, 30),
    ],
)
def test_it_learns_what_is_paid(paid, changes, updates: int) -> None:
    policy, rows, decisions, slots = small_policy(), 32, 2, 2
    agent = PPOAgent(policy, PPOConfig(policy_rate=5e-3, target_kl=0.2, **changes), 0)
    rollout, masks, generator = Rollout(decisions, rows, slots), empty_slots(rows, slots), seeded(0)
    shares = []
    for update in range(updates):
        hidden, earned = policy.initial_hidden(rows), []
        for t in range(decisions):
            observation = random_observation(rows, slots, 100 * update + t)
            made = policy.get_action(observation, masks, hidden, torch.rand(rows, HEAD_COUNT, generator=generator))
            hidden = made.hidden
            rollout.store(t, observation, made, torch.ones(rows, dtype=torch.bool))
            earned.append(paid(made))
            rollout.pay(t, earned[-1])
        shares.append(float(torch.stack(earned).mean()))
        agent.update(rollout)
    assert shares[0] < 0.7
    assert shares[-1] > 0.9
