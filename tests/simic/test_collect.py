"""One round of experience: what the rollout holds is what was seen, decided and paid."""

import pytest
import torch

from esper.leyline.actions import Head, Op
from esper.leyline.config import ContextConfig
from esper.simic.collect import collect
from esper.simic.rollout import Rollout
from helpers.environments import environment
from helpers.rollouts import moved, small_policy

GROUPS, SIZE, HORIZON, SLOTS = 2, 4, 6, 3
ROWS = GROUPS * SIZE
TENSORS = (
    "slot_TRSF",
    "run_TRF",
    "action_TRH",
    "mask_TRHC",
    "log_prob_TRH",
    "value_TR",
    "reward_TR",
    "made_TR",
    "group_R",
)


class Watched:
    """An environment that keeps what it shows, is told and pays."""

    def __init__(self, inner):
        self.inner, self.shown, self.told, self.paid, self.resets, self.scores = inner, [], [], [], [], []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def _show(self, situation):
        observation = situation.observation
        self.shown.append((observation.slot_RSF.clone(), observation.run_RF.clone()))
        return situation

    def reset(self, number):
        self.resets.append(number)
        return self._show(self.inner.reset(number))

    def situation(self):
        return self._show(self.inner.situation())

    def step(self, action_RH, scores=None, flag=None):
        self.told.append(action_RH.clone())
        self.scores.append((scores, flag))
        payment = self.inner.step(action_RH, scores, flag)
        self.paid.append(payment.reward_R.clone())
        return payment


def world(groups=GROUPS, **more):
    return environment(groups=groups, size=SIZE, horizon=HORIZON, contexts=ContextConfig(), **more)


def policy():
    """Nothing in it is symmetric."""
    return moved(small_policy())


def gathered(env=None, rollout=None, seed=0, number=0, **how):
    env = env or world()
    return collect(env, policy(), rollout or Rollout(HORIZON, env.rows, SLOTS), seed, number, **how)


def same(ours, theirs):
    for name in TENSORS:
        one, other = getattr(ours, name), getattr(theirs, name)
        assert torch.equal(one.isnan(), other.isnan()), name
        assert torch.equal(one.nan_to_num(), other.nan_to_num()), name


def test_it_holds_what_was_shown_told_and_paid():
    env = Watched(world())
    rollout = gathered(env, number=3)
    assert env.resets == [3]
    assert len(env.shown) == len(env.told) == len(env.paid) == HORIZON
    for decision in range(HORIZON):
        slot_RSF, run_RF = env.shown[decision]
        assert torch.equal(rollout.slot_TRSF[decision], slot_RSF)
        assert torch.equal(rollout.run_TRF[decision].nan_to_num(9), run_RF.nan_to_num(9))
        assert torch.equal(rollout.action_TRH[decision], env.told[decision])
        assert torch.equal(rollout.reward_TR[decision], env.paid[decision])
        scores, flag = env.scores[decision]
        assert torch.equal(rollout.log_prob_TRH[decision], scores.log_prob_RH)
        assert torch.equal(rollout.value_TR[decision], scores.value_R)
        assert int(flag) == 0
    assert rollout.made_TR.all()
    assert torch.equal(rollout.group_R, env.contexts.group_R)
    assert (rollout.reward_TR != 0).any()


def test_it_scores_as_learning_will():
    rollout, network = gathered(), policy()
    again = network.evaluate_actions(rollout.observation(torch.arange(ROWS)), rollout.action_TRH, rollout.mask_TRHC)
    torch.testing.assert_close(rollout.log_prob_TRH.sum(-1), again.log_prob_TRH.sum(-1), rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.log_prob_TRH, again.log_prob_TRH, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.value_TR, again.value_TR, rtol=0, atol=1e-5)
    assert (rollout.log_prob_TRH.sum(-1) < -0.1).any()


def test_every_action_is_one_that_its_mask_allows():
    rollout = gathered()
    chosen = rollout.mask_TRHC.gather(-1, rollout.action_TRH[..., None])
    assert chosen.all()
    assert (rollout.mask_TRHC.sum(-1) >= 1).all()
    ops = set(rollout.action_TRH[..., Head.OP].flatten().tolist())
    assert {Op.WAIT, Op.GERMINATE} <= ops


def test_the_first_observation_is_that_of_an_untouched_host():
    rollout = gathered()
    assert rollout.run_TRF[0, :, 0].isnan().all()
    assert rollout.run_TRF[1:, :, 0].isfinite().all()


def test_the_same_seed_and_number_give_the_same_round():
    same(gathered(seed=2, number=5), gathered(seed=2, number=5))


def test_a_rollout_is_overwritten():
    env, rollout = world(), Rollout(HORIZON, ROWS, SLOTS)
    gathered(env, rollout, number=0)
    gathered(env, rollout, number=1)
    same(rollout, gathered(number=1))


@pytest.mark.parametrize("change", [{"seed": 1}, {"number": 1}])
def test_seed_and_number_decide_what_is_drawn(change):
    one, other = gathered(), gathered(**change)
    # The same slots are shown at first, so that only draws can tell them apart.
    assert torch.equal(one.slot_TRSF[0], other.slot_TRSF[0])
    assert torch.equal(one.mask_TRHC[0, :, Head.OP], other.mask_TRHC[0, :, Head.OP])
    assert not torch.equal(one.action_TRH, other.action_TRH)


def test_rows_draw_on_their_own():
    action_TRH = gathered().action_TRH
    assert len({tuple(action_TRH[:, row].flatten().tolist()) for row in range(ROWS)}) > ROWS // 2


def test_decisions_draw_on_their_own():
    """Among rows whose masks are those of the decision before, choices are not those of the decision before."""
    rollout = gathered()
    equal = [bool(torch.equal(rollout.action_TRH[t], rollout.action_TRH[t - 1])) for t in range(1, HORIZON)]
    assert not any(equal)


def test_greedy_draws_nothing():
    one, other = (gathered(seed=seed, greedy=True) for seed in (0, 1))
    same(one, other)
    # All rows see the same at first but for price, and a group sees exactly the same.
    for group in range(GROUPS):
        rows = one.action_TRH[0, SIZE * group : SIZE * (group + 1)]
        assert (rows == rows[0]).all()
    assert not torch.equal(one.action_TRH, gathered(seed=0).action_TRH)


def test_greedy_takes_the_most_likely_operation():
    rollout, network = gathered(greedy=True), policy()
    mask = rollout.mask_TRHC[..., Head.OP, : len(Op)]
    best = torch.full(mask.shape[:2], -torch.inf)
    for op in Op:
        action = torch.zeros_like(rollout.action_TRH)
        action[..., Head.OP] = int(op)
        scored = network.evaluate_actions(rollout.observation(torch.arange(ROWS)), action, rollout.mask_TRHC)
        allowed = torch.where(mask[..., int(op)], scored.log_prob_TRH[..., Head.OP], -torch.inf)
        best = torch.maximum(best, allowed)
    torch.testing.assert_close(rollout.log_prob_TRH[..., Head.OP], best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1, 7])
def test_more_rows_change_no_draw_of_the_earlier_ones(number):
    small, large = gathered(number=number), gathered(world(groups=2 * GROUPS), number=number)
    assert torch.equal(small.action_TRH, large.action_TRH[:, :ROWS])


def test_no_two_rounds_draw_the_same():
    first = [tuple(gathered(number=number).action_TRH.flatten().tolist()) for number in range(6)]
    assert len(set(first)) == 6


def test_whoever_wants_is_told_of_every_decision():
    told = []
    rollout = gathered(each=lambda decision, payment: told.append((decision, payment)))
    assert [decision for decision, _ in told] == list(range(HORIZON))
    assert [payment.done for _, payment in told] == [False] * (HORIZON - 1) + [True]
    for decision, payment in told:
        assert torch.equal(payment.reward_R, rollout.reward_TR[decision])


def test_twins_are_paid_nothing_whatever_the_policy_wants():
    env = world()
    learners = torch.arange(ROWS)[torch.arange(ROWS) % SIZE > 0]
    rollout = gathered(env, Rollout(HORIZON, ROWS, SLOTS, learners_N=learners))
    assert torch.equal(rollout.learners_N, env.contexts.learners_N)
    assert (rollout.reward_TR[:, ::SIZE] == 0).all()
    assert not rollout.free_TR[:, ::SIZE].any()
    assert rollout.free_TR[:, 1].any()


def test_it_leaves_no_gradients():
    rollout = gathered()
    assert not any(getattr(rollout, name).requires_grad for name in TENSORS)
