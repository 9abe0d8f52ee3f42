"""What an update does to a policy, and what it leaves alone."""

import pytest
import torch
from torch import Tensor

from esper.leyline.actions import Head
from esper.leyline.config import PPOConfig
from esper.leyline.errors import EsperError, InvalidStateMachineError
from esper.simic import ppo
from esper.simic.ppo import MOST_SKIPPED_UPDATES, PPOAgent
from esper.simic.rollout import Rollout
from helpers.rollouts import KNOWN, Policy, random_rollout, seeded, small_policy

NAN, INF = float("nan"), float("inf")
FAR = 1e9
LENGTHS = [6, 4, 6, 0, 2, 6, 5, 3]


def config_of(**changes: object) -> PPOConfig:
    return PPOConfig(**{"target_kl": FAR, **changes})


def weights(policy: Policy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name, kept in one.items():
        torch.testing.assert_close(kept, other[name], rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(not torch.equal(kept, other[name]) for name, kept in one.items())


def everything(policy: Policy, rollout: Rollout):
    every = torch.arange(rollout.made_TR.shape[1])
    share = rollout.uniform_share
    return policy.evaluate_actions(
        rollout.observation(every), rollout.action_TRH, rollout.mask_TRHC, uniform_share=share
    )


def watched(agent: PPOAgent) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Everything that a step may change, before and after each."""
    seen, before = [], []

    def state(*_: object) -> dict[str, Tensor]:
        now = weights(agent.policy)
        for name, parameter in agent.policy.named_parameters():
            for key, value in agent.optimizer.state.get(parameter, {}).items():
                now[f"{name}/{key}"] = value.clone()
        return now

    agent.optimizer.register_step_pre_hook(lambda *_: before.append(state()))
    agent.optimizer.register_step_post_hook(lambda *_: seen.append((before[-1], state())))
    return seen


def unchanged(step: tuple[dict[str, Tensor], dict[str, Tensor]]) -> bool:
    """A state that is made by the step begins at zero."""
    before, after = step
    return all(torch.equal(before.get(name, torch.zeros_like(kept)), kept) for name, kept in after.items())


def spoil(monkeypatch: pytest.MonkeyPatch, policy: Policy, calls: set[int], wild: float = NAN) -> list[Tensor]:
    """Values that are not finite in some calls of `evaluate_actions`; collects what each looks at."""
    whole, seen = policy.evaluate_actions, []

    def evaluate(observation, *args, **how):
        told = whole(observation, *args, **how)
        if len(seen) in calls:
            told.value_TR.data.fill_(wild)
        seen.append(observation.slot_RSF)
        return told

    monkeypatch.setattr(policy, "evaluate_actions", evaluate)
    return seen


# --- Where it begins ---


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("ratio", ["joint", "per-head"])
def test_before_the_first_step_the_ratio_is_1(ratio: str, share: float) -> None:
    policy = small_policy()
    # Statistics of an earlier round; those of this one come only after the update.
    policy.statistics.update(torch.randn(30, KNOWN, generator=seeded(1)) * 3 + 1)
    rollout = random_rollout(policy, lengths=LENGTHS, uniform_share=share)
    told = everything(policy, rollout)
    torch.testing.assert_close(told.log_prob_TRH.detach(), rollout.log_prob_TRH, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(told.value_TR.detach(), rollout.value_TR, rtol=1e-5, atol=1e-5)
    report = PPOAgent(policy, config_of(epochs=1, minibatches=1, ratio=ratio), 0).update(rollout)
    assert (report.epochs, report.minibatches, report.stopped_early) == (1, 1, False)
    assert 0 <= report.kl_nats < 1e-6
    assert report.clip_share == 0
    # Normalised advantages times 1, once or for each head: their mean over decisions is 0 for the joint ratio.
    assert ratio == "per-head" or report.policy_loss == pytest.approx(0, abs=1e-5)
    assert all(head.kl_nats < 1e-6 for head in report.heads.values())
    after = everything(policy, rollout).log_prob_TRH
    assert ((after - rollout.log_prob_TRH).abs().sum(-1)[rollout.free_TR] > 1e-5).all()


def test_the_divergence_grows_with_the_passes() -> None:
    kls = []
    for epochs in (1, 2, 4):
        policy = small_policy()
        agent = PPOAgent(policy, config_of(epochs=epochs, minibatches=1, policy_rate=3e-3), 0)
        kls.append(agent.update(random_rollout(policy)).kl_nats)
    assert kls[0] < 1e-6 < kls[1] < kls[2]


def test_statistics_see_the_round_after_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    rollout = random_rollout(policy, lengths=LENGTHS, learners=[0, 1, 2, 3, 4, 5])
    for wild, at in ((NAN, 0), (1e9, 1)):
        rollout.run_TRF[..., at][~rollout.made_TR] = wild
    assert not rollout.made_TR[0, 3]
    rollout.run_TRF[0, 3, 2] = INF
    during = []
    agent = PPOAgent(policy, config_of(epochs=2, minibatches=3), 0)
    agent.optimizer.register_step_post_hook(lambda *_: during.append(float(policy.statistics.count.sum())))
    agent.update(rollout)
    assert during == [0.0] * 6
    for k in range(KNOWN):
        column = rollout.run_TRF[..., k][rollout.made_TR].double()
        column = column[column.isfinite()]
        assert policy.statistics.count[k] == len(column)
        torch.testing.assert_close(policy.statistics.mean[k], column.mean(), rtol=1e-5, atol=1e-6)


# --- What is not learned from ---


def updated(changed, **changes: object) -> dict[str, Tensor]:
    """Weights after an update with a round that was tampered with."""
    policy = small_policy()
    rollout = random_rollout(policy, lengths=LENGTHS, learners=[0, 1, 2, 3, 4, 5], forced=0.4)
    changed(rollout)
    agent = PPOAgent(policy, config_of(epochs=2, minibatches=2, gae_lambda=0.9, **changes), 0)
    assert agent.update(rollout).minibatches == 4
    return weights(policy)


def nothing(rollout: Rollout) -> None:
    pass


def scramble(rollout: Rollout, where_TR: Tensor, number: float = 3.0) -> None:
    """All that is known of some decisions, but for whether they were made."""
    for name in ("reward_TR", "value_TR", "log_prob_TRH", "slot_TRSF", "run_TRF"):
        getattr(rollout, name)[where_TR] += number
    rollout.action_TRH[where_TR] = 0
    rollout.mask_TRHC[where_TR] = True


RATIOS = [{"ratio": "joint"}, {"ratio": "per-head"}, {"advantage": "group"}]


@pytest.mark.parametrize("changes", RATIOS)
def test_decisions_that_were_not_made_teach_nothing(changes) -> None:
    assert_same(updated(nothing, **changes), updated(lambda r: scramble(r, ~r.made_TR), **changes))


@pytest.mark.parametrize("name", ["reward_TR", "value_TR", "log_prob_TRH"])
def test_what_is_not_finite_where_no_decision_was_made_teaches_nothing(name: str) -> None:
    def change(rollout: Rollout) -> None:
        getattr(rollout, name)[~rollout.made_TR] = NAN

    assert_same(updated(nothing), updated(change))


@pytest.mark.parametrize("changes", RATIOS)
def test_twins_teach_nothing(changes) -> None:
    told = updated(lambda r: scramble(r, ~r.learns_R.expand_as(r.made_TR)), **changes)
    assert_same(updated(nothing, **changes), told)


def test_a_twin_whose_reward_is_not_finite_teaches_nothing() -> None:
    def change(rollout: Rollout) -> None:
        rollout.reward_TR[0, 6] = NAN

    assert_same(updated(nothing), updated(change))


def test_advantages_of_forced_decisions_teach_the_policy_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rewards belong to the decisions before; only what is made of them for themselves must not count."""
    told, whole = [], ppo.generalized_advantages
    for number in (0.0, 1e3):
        policy = small_policy()
        rollout = random_rollout(policy, lengths=LENGTHS, forced=0.4)
        forced = rollout.made_TR & ~rollout.free_TR
        assert forced.any()
        added = number * forced
        monkeypatch.setattr(ppo, "generalized_advantages", lambda *args, added=added: whole(*args) + added)
        PPOAgent(policy, config_of(epochs=2, minibatches=2, value_weight=0.0), 0).update(rollout)
        told.append({name: kept for name, kept in weights(policy).items() if "value_head" not in name})
    assert_same(*told, atol=1e-7)


def test_a_round_without_a_choice_teaches_the_policy_nothing() -> None:
    """The last layer of the value follows its unit all the same."""
    policy = small_policy()
    rollout = random_rollout(policy, forced=1.1)
    assert not rollout.free_TR.any()
    before = weights(policy)
    report = PPOAgent(policy, config_of(value_weight=0.0), 0).update(rollout)
    assert report.policy_loss == report.kl_nats == report.entropy == 0
    kept = weights(policy)
    for name in before:
        if "value_head.2" not in name:
            assert torch.equal(before[name], kept[name]), name


# --- The early stop ---


@pytest.mark.parametrize("minibatches", [1, 3])
def test_it_stops_before_the_step_that_would_go_too_far(minibatches: int) -> None:
    agents, reports, steps = [], [], []
    for limit in (1e-9, FAR):
        policy = small_policy()
        rollout = random_rollout(policy, lengths=LENGTHS)
        agents.append(PPOAgent(policy, config_of(epochs=3, minibatches=minibatches, target_kl=limit), 0))
        steps.append(watched(agents[-1]))
        reports.append(agents[-1].update(rollout))
    stopped, free = reports
    assert (stopped.stopped_early, free.stopped_early) == (True, False)
    assert (stopped.minibatches, free.minibatches) == (1, 3 * minibatches)
    assert (stopped.epochs, free.epochs) == (2 if minibatches == 1 else 1, 3)
    assert stopped.skipped_minibatches == 0
    assert stopped.kl_nats > 1e-9, "that of the step not taken is among them"
    # After the first step, exactly.
    assert_same(weights(agents[0].policy), {k: v for k, v in steps[1][0][1].items() if "/" not in k})
    assert not unchanged(steps[0][0])
    assert all(unchanged(step) for step in steps[0][1:])


def test_a_stop_is_of_one_update_alone() -> None:
    policy = small_policy()
    agent = PPOAgent(policy, config_of(epochs=2, minibatches=2, target_kl=1e-9), 0)
    for seed in range(3):
        before = weights(policy)
        report = agent.update(random_rollout(policy, seed=seed))
        assert (report.minibatches, report.stopped_early) == (1, True)
        assert differ(before, weights(policy))


# --- The critic ---


@pytest.mark.parametrize("rounding", [0.0, 3e-7])
@pytest.mark.parametrize("worth", [0.0, 0.05, -3.0])
def test_equal_returns_give_no_explosion(worth: float, rounding: float) -> None:
    """All is paid at the end, to everybody the same: nothing is explained, and nothing is there to learn."""
    policy = small_policy()
    agent = PPOAgent(policy, config_of(entropy_weight=0.0), 0)
    for seed in range(3):
        rollout = random_rollout(policy, seed=seed)
        rollout.reward_TR.zero_()
        rollout.reward_TR[-1] = worth * (1 + rounding * torch.randn(8, generator=seeded(seed)))
        report = agent.update(rollout)
        assert report.explained_variance != report.explained_variance, "not measured"
        assert report.skipped_minibatches == 0
        assert report.value_loss < 1
        assert report.gradient_norm < 10
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in policy.parameters())


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_first_gradient_is_not_that_of_a_critic_that_knows_nothing(scale: float) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    rollout.reward_TR *= scale
    report = PPOAgent(policy, config_of(epochs=1, minibatches=1), 0).update(rollout)
    assert report.explained_variance == pytest.approx(0, abs=1e-4)
    # In standard deviations: that of the best constant.
    assert report.value_loss == pytest.approx(0.5, rel=0.05)


# --- What is not finite ---


@pytest.mark.parametrize("wild", [NAN, INF])
@pytest.mark.parametrize("call", [0, 1, 3, 5])
def test_a_minibatch_that_is_not_finite_is_skipped(monkeypatch: pytest.MonkeyPatch, call: int, wild: float) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent = PPOAgent(policy, config_of(epochs=2, minibatches=3), 0)
    steps = watched(agent)
    spoil(monkeypatch, policy, {call}, wild)
    report = agent.update(rollout)
    assert (report.minibatches, report.skipped_minibatches, report.stopped_early) == (5, 1, False)
    assert [unchanged(step) for step in steps] == [n == call for n in range(6)]
    assert all(p.isfinite().all() for p in policy.parameters())
    assert all(torch.tensor(x).isfinite() for x in (report.kl_nats, report.policy_loss, report.value_loss))
    assert report.gradient_norm < INF


@pytest.mark.parametrize(("calls", "epochs"), [({0}, 1), ({1}, 1), ({0, 1}, 0)])
def test_a_pass_that_is_not_finite_is_left_out_of_the_report(
    monkeypatch: pytest.MonkeyPatch, calls: set[int], epochs: int
) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent = PPOAgent(policy, config_of(epochs=2, minibatches=1), 0)
    spoil(monkeypatch, policy, calls)
    report = agent.update(rollout)
    assert (report.minibatches, report.skipped_minibatches) == (2 - len(calls), len(calls))
    measured = report.kl_nats, report.policy_loss, report.value_loss, report.entropy, report.heads["op"].entropy
    assert [x == x for x in measured] == [bool(epochs)] * 5


def test_updates_in_a_row_that_are_not_finite_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    agent = PPOAgent(policy, config_of(epochs=1, minibatches=2), 0)
    bad = MOST_SKIPPED_UPDATES - 1
    for _ in range(2):
        for skipped in [1] * bad + [0]:
            with monkeypatch.context() as patch:
                spoil(patch, policy, {1} if skipped else set())
                assert agent.update(rollout).skipped_minibatches == skipped
    spoil(monkeypatch, policy, {2 * n + 1 for n in range(9)})
    for _ in range(bad):
        agent.update(rollout)
    with pytest.raises(EsperError, match="minibatches of 3 updates in a row were not finite; the policy has diverged"):
        agent.update(rollout)
    assert all(p.isfinite().all() for p in policy.parameters())


def test_a_reward_that_is_not_finite_leaves_the_policy_as_it_was() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    rollout.reward_TR[2, 3] = NAN
    before = weights(policy)
    report = PPOAgent(policy, config_of(), 0).update(rollout)
    assert report.minibatches + report.skipped_minibatches == 16
    assert report.skipped_minibatches > 0
    assert all(p.isfinite().all() for p in policy.parameters())
    assert all(b.isfinite().all() for b in policy.buffers())
    assert report.minibatches or not differ(
        *({k: v for k, v in w.items() if "value_head.2" not in k} for w in (before, weights(policy)))
    )


def test_an_observation_that_is_not_finite_is_reported_and_not_learned() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    rollout.slot_TRSF[1, 2, 0, 0] = NAN
    agent = PPOAgent(policy, config_of(epochs=1, minibatches=4), 0)
    steps = watched(agent)
    with pytest.raises(EsperError, match="logit that is not finite"):
        agent.update(rollout)
    assert sum(unchanged(step) for step in steps) == 1
    assert all(p.isfinite().all() for p in policy.parameters())


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_is_wrong_with_several_minibatches_is_all_told(order: tuple[int, int]) -> None:
    """An empty mask in one minibatch and a wild logit in another: the mask is raised, and the logit named."""
    policy = small_policy()
    rollout = random_rollout(policy)
    agent = PPOAgent(policy, config_of(epochs=1, minibatches=2), 0)
    zero = torch.zeros(1, dtype=torch.int64)
    dealt = agent._stream.permutations(zero, zero, 8)[0].view(2, 4)[list(order)]
    # An observation alone: its minibatch raises something else.
    rollout.slot_TRSF[1, dealt[0, 0], 0, 0] = NAN
    rollout.mask_TRHC[1, dealt[1, 0], Head.OP] = False
    with pytest.raises(InvalidStateMachineError, match=r"no valid choice.*also has a logit that is not finite"):
        agent.update(rollout)


def test_running_features_that_were_not_measured_are_no_features() -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    rollout.run_TRF[..., :KNOWN] = NAN
    report = PPOAgent(policy, config_of(), 0).update(rollout)
    assert report.skipped_minibatches == 0
    assert not policy.statistics.count.any()


@pytest.mark.parametrize("ratio", ["joint", "per-head"])
@pytest.mark.parametrize("stored", [-100.0, 100.0, -1e30])
def test_a_ratio_beyond_every_number_is_cut_off(stored: float, ratio: str) -> None:
    policy = small_policy()
    rollout = random_rollout(policy)
    rollout.log_prob_TRH[:, ::2, Head.OP] = stored
    report = PPOAgent(policy, config_of(epochs=1, minibatches=2, ratio=ratio), 0).update(rollout)
    assert report.skipped_minibatches == 0
    measured = torch.tensor([report.policy_loss, report.kl_nats, report.gradient_norm])
    assert measured.isfinite().all()
    assert all(p.isfinite().all() for p in policy.parameters())
    assert report.clip_share > 0.3
