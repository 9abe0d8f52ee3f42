"""Successive halving: what goes on, what it costs, and what it finds."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.exam.search import FIRST_STARTS, RUNGS, SHARE, rungs, search, survivors
from esper.leyline.config import HeadroomConfig, TrainConfig
from esper.leyline.errors import EsperError
from esper.leyline.starts import CHOICE
from helpers.exams import KnownPlayer


@given(episodes=st.integers(1, 100_000), contexts=st.integers(1, 60))
def test_rungs_keep_within_the_budget_and_share_no_start(episodes, contexts):
    try:
        made = rungs(episodes, contexts, 1)
    except EsperError:
        assert episodes < contexts * FIRST_STARTS * (1 + SHARE + SHARE**2)
        return
    cost = [contexts * rung.plans * len(rung.starts) for rung in made]
    assert sum(cost) <= episodes
    starts = [start for rung in made for start in rung.starts]
    assert starts == list(range(CHOICE.start, CHOICE.start + FIRST_STARTS * (1 + SHARE + SHARE**2)))
    assert [len(rung.starts) for rung in made] == [FIRST_STARTS * SHARE**n for n in range(RUNGS)]
    for one, other in pairwise(made):
        assert (one.plans - 1) / SHARE <= other.plans - 1 < (one.plans - 1) / SHARE + 1
    # One plan more would be too much.
    if made[0].plans > 1:
        assert sum(cost) > episodes - contexts * FIRST_STARTS * (1 + SHARE + SHARE**2)


def test_a_budget_that_is_too_small_is_refused_in_one_line():
    with pytest.raises(EsperError, match=r"episodes: 100 are enough to search among 0 plans; .* are 86 and need 3,300"):
        rungs(100, 6, 86)


def test_the_default_budget_is_that_of_a_policy():
    policy = TrainConfig()
    assert HeadroomConfig().episodes >= policy.rounds * policy.rows


def test_who_is_good_for_anything_goes_on():
    """Plans 1 to 4: best overall, best when parameters are dear, best in one context, and good for nothing."""
    gain_WCN = np.array([[[0, 0.5, 0.30, 0.0, 0.2], [0, 0.5, 0.30, 0.7, 0.2]]])
    cost_WCN = np.broadcast_to([0, 1.0, 0.1, 1.0, 1.0], gain_WCN.shape)
    assert survivors(gain_WCN, cost_WCN, (0.0, 0.4), 4).tolist() == [0, 1, 2, 3]
    # Of those that are best for something, the better ones overall.
    assert survivors(gain_WCN, cost_WCN, (0.0, 0.4), 3).tolist() == [0, 1, 2]
    assert survivors(gain_WCN, cost_WCN, (0.0, 0.4), 2).tolist() == [0, 1]


def test_the_best_third_of_one_target_goes_on():
    gain_WCN = np.random.default_rng(0).permutation(31)[None, None] / 31.0
    gain_WCN[..., 0] = 0
    went = survivors(gain_WCN, np.zeros_like(gain_WCN), (0.0,), 11)
    assert went.tolist() == [0, *sorted(1 + np.argsort(-gain_WCN[0, 0, 1:])[:10])]


def test_a_planted_optimum_is_found():
    """One plan of 300 is better by two deviations of an episode; and another in one of six contexts alone."""
    gain_WCN = np.random.default_rng(0).normal(0.05, 0.02, (1, 6, 300))
    gain_WCN[..., 0] = 0
    gain_WCN[..., 123] = 0.15
    gain_WCN[0, 4, 211] = 0.4
    player = KnownPlayer(gain_WCN, np.zeros(300), luck=0.05)
    found = search(player, rungs(11_000, 6, 1), (1, 6), (0.0,))
    assert found.finalists[found.net(0.0)[..., found.finalists].mean((0, 1)).argmax()] == 123
    assert found.finalists[found.net(0.0)[0, 4, found.finalists].argmax()] == 211


def test_what_is_seen_of_a_plan_is_its_mean_over_all_its_starts():
    gain_WCN = np.random.default_rng(0).normal(0.1, 0.05, (2, 3, 60))
    gain_WCN[..., 0] = 0
    player = KnownPlayer(gain_WCN, np.arange(60) / 60, luck=0.3)
    made = rungs(60 * 6 * 6, 6, 1)
    found = search(player, made, (2, 3), (0.0, 0.1))
    total, count = np.zeros((2, 3, 60)), np.zeros((2, 3, 60))
    again = KnownPlayer(gain_WCN, np.arange(60) / 60, luck=0.3)
    for episodes in player.asked:
        loss, _ = again.play(episodes)
        at = {
            (s, c, n): x
            for s, c, n, x in zip(episodes.start_R, episodes.condition_R, episodes.plan_R, loss, strict=True)
        }
        for (start, c, n), value in at.items():
            total[episodes.host, c, n] += at[start, c, 0] - value
            count[episodes.host, c, n] += 1
    plans = made[0].plans
    np.testing.assert_array_equal(count[..., :plans], np.broadcast_to(found.starts_N, (2, 3, plans)))
    np.testing.assert_allclose(found.gain_WCN, (total / np.maximum(count, 1))[..., :plans], atol=1e-12)
    np.testing.assert_allclose(found.cost_WCN, np.broadcast_to(np.arange(plans) / 60, (2, 3, plans)))
    assert set(found.starts_N[found.finalists]) == {FIRST_STARTS * (1 + SHARE + SHARE**2)}
    assert found.finalists[0] == 0
