"""Storage of one round: what goes in comes out, in the same memory round after round."""

import pytest
import torch

from esper.leyline.actions import HEAD_COUNT
from esper.simic.rollout import Rollout
from esper.tamiyo.policy.action_masks import choice_count
from esper.tamiyo.policy.network import Decision
from esper.tamiyo.policy.observation import Observation
from helpers.rollouts import fill, random_masks, random_observation, random_rollout, seeded, small_policy

STORED = ("slot_TRSF", "run_TRF", "action_TRH", "mask_TRHC", "log_prob_TRH", "value_TR", "reward_TR", "made_TR")
FROM_OBSERVATION = {"slot_TRSF": "slot_RSF", "run_TRF": "run_RF"}
FROM_DECISION = {
    "action_TRH": "action_RH",
    "mask_TRHC": "mask_RHC",
    "log_prob_TRH": "log_prob_RH",
    "value_TR": "value_R",
}


def decide(rows: int, slots: int, seed: int) -> tuple[Observation, Decision]:
    policy = small_policy()
    observation = random_observation(rows, slots, seed)
    uniform = torch.rand(rows, HEAD_COUNT, generator=seeded(seed))
    masks = random_masks(rows, slots, seed)
    return observation, policy.get_action(observation, masks, policy.initial_hidden(rows), uniform)


@pytest.mark.parametrize("slots", [1, 3, 20])
def test_everything_comes_out_as_it_went_in(slots: int) -> None:
    rollout, rows = Rollout(4, 5, slots), 5
    assert rollout.mask_TRHC.shape == (4, 5, HEAD_COUNT, choice_count(slots))
    given = [decide(rows, slots, t) for t in range(4)]
    running = [torch.rand(rows, generator=seeded(t)) < 0.5 for t in range(4)]
    rewards = [torch.randn(rows, generator=seeded(t)) for t in range(4)]
    for t in (2, 0, 3, 1):
        rollout.store(t, *given[t], running[t])
    # A reward is known later than what earned it.
    for t in (1, 3, 2, 0):
        rollout.pay(t, rewards[t])
    for t, (observation, decision) in enumerate(given):
        for source, names in ((observation, FROM_OBSERVATION), (decision, FROM_DECISION)):
            for field, name in names.items():
                kept, went_in = getattr(rollout, field)[t], getattr(source, name)
                assert kept.dtype == went_in.dtype
                torch.testing.assert_close(kept, went_in, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rollout.made_TR[t], running[t])
        assert torch.equal(rollout.reward_TR[t], rewards[t])


def test_it_keeps_copies() -> None:
    rollout = Rollout(1, 5, 3)
    observation, decision = decide(5, 3, 0)
    running, reward = torch.ones(5, dtype=torch.bool), torch.ones(5)
    rollout.store(0, observation, decision, running)
    rollout.pay(0, reward)
    kept = {name: getattr(rollout, name).clone() for name in STORED}
    sources = (*vars(observation).values(), decision.action_RH, decision.mask_RHC, decision.log_prob_RH)
    for source in (*sources, decision.value_R, running, reward):
        source.zero_()
    for name, before in kept.items():
        torch.testing.assert_close(getattr(rollout, name), before, rtol=0, atol=0, equal_nan=True)


def test_rounds_use_the_same_memory() -> None:
    policy, rollout = small_policy(), Rollout(3, 4, 2)
    places = {name: getattr(rollout, name).data_ptr() for name in STORED}
    for seed in range(3):
        fill(rollout, policy, seed, lengths=[3, 1, 2, 3])
        assert places == {name: getattr(rollout, name).data_ptr() for name in STORED}
        other = random_rollout(policy, 3, 4, 2, seed, lengths=[3, 1, 2, 3])
        for name in STORED:
            torch.testing.assert_close(getattr(rollout, name), getattr(other, name), rtol=0, atol=0, equal_nan=True)


def test_a_free_decision_was_made_is_learned_from_and_left_a_choice() -> None:
    lengths = [6, 4, 0, 6, 2, 3, 6, 1]
    rollout = random_rollout(small_policy(), lengths=lengths, learners=[0, 1, 2, 4, 6], forced=0.4)
    free_TR, kinds = rollout.free_TR, set()
    for t in range(6):
        for row in range(8):
            choice = any(sum(mask) > 1 for mask in rollout.mask_TRHC[t, row].tolist())
            made, learns = t < lengths[row], row in (0, 1, 2, 4, 6)
            assert bool(free_TR[t, row]) == (made and learns and choice)
            kinds.add((made, learns, choice))
    assert len(kinds) == 8, "every kind was there"


def test_by_default_everyone_learns_in_one_group() -> None:
    rollout = Rollout(2, 4, 1)
    assert rollout.group_R.tolist() == [0, 0, 0, 0]
    assert rollout.learners_N.tolist() == [0, 1, 2, 3]
    assert rollout.learns_R.tolist() == [True] * 4


def test_learners_may_come_in_any_order() -> None:
    rollout = Rollout(2, 4, 1, group_R=torch.tensor([0, 0, 2, 2]), learners_N=torch.tensor([3, 0]))
    assert rollout.group_R.tolist() == [0, 0, 2, 2]
    assert rollout.learners_N.tolist() == [3, 0]
    assert rollout.learns_R.tolist() == [True, False, False, True]


def test_an_observation_of_some_rows_is_of_all_decisions() -> None:
    rollout = random_rollout(small_policy(), 3, 5, 2)
    seen = rollout.observation(torch.tensor([4, 1]))
    for row, source in enumerate((4, 1)):
        assert torch.equal(seen.slot_RSF[:, row], rollout.slot_TRSF[:, source])
        torch.testing.assert_close(seen.run_RF[:, row], rollout.run_TRF[:, source], rtol=0, atol=0, equal_nan=True)
