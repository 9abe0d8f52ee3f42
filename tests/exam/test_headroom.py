"""What a search is worth: what is chosen, and what is said of it on fresh starts."""

import numpy as np
import pytest

from esper.exam.headroom import ASKED, LEAST, Headroom, Way, choose, score, worth
from esper.exam.plans import NOTHING, Plan, Seed
from esper.exam.search import Found
from esper.leyline.actions import Blueprint, Style
from esper.leyline.starts import CHOICE, EXAM, REPLAY, SCORE
from helpers.exams import (
    EPISODES,
    NOISE,
    PRICES,
    RATES,
    STARTS,
    WIDTHS,
    KnownPlayer,
    headroom_config,
    known_headroom,
    small_headroom,
)

SHAPE = (len(WIDTHS), len(RATES) * len(NOISE), len(PRICES))


def by_hand(luck=0.0):
    """One width, two conditions, three plans: nothing; good in the first condition; in the second."""
    gain_WCN = np.array([[[0, 0.4, 0.0], [0, 0.1, 0.3]]])
    cost_WCN = np.broadcast_to([0.0, 1.0, 1.0], gain_WCN.shape)
    found = Found(np.full(3, 26), gain_WCN, cost_WCN, np.arange(3))
    prices = (0.0, 0.15, 1.0)
    chosen = choose(found, prices)
    gain, cost = score(KnownPlayer(gain_WCN, [0, 1, 1], luck), chosen, 8)
    plans = (NOTHING, *(Plan((Seed(0, b, Style.LINEAR_ADD),)) for b in (Blueprint.NORM, Blueprint.MLP_SMALL)))
    conditions = ((0.1, 0.0), (0.1, 0.4))
    return Headroom(plans, ("r0c0",), (1.0,), conditions, prices, 100, found, chosen, gain, cost)


def test_what_is_chosen():
    """Over the three prices NORM is worth .25, .10 and -.75 and MLP_SMALL less: nothing is the best single plan."""
    table = by_hand()
    assert (table.chosen_VWCP[Way.SINGLE] == 0).all()
    assert table.chosen_VWCP[Way.BY_PRICE, 0].tolist() == [[1, 1, 0], [1, 1, 0]]
    assert table.chosen_VWCP[Way.BY_CONTEXT, 0].tolist() == [[1, 1, 0], [2, 2, 0]]


def test_what_choosing_is_worth():
    """NORM gives (.4 + .1)/2 = .25, by context (.4 + .3)/2 = .35; at .15 it is .10 and .20; at 1 nothing pays."""
    table = by_hand()
    free, dear, dearest = (worth(table, price) for price in range(3))
    assert free.net == pytest.approx((0.0, 0.25, 0.35))
    assert dear.net == pytest.approx((0.0, 0.10, 0.20))
    assert dearest.net == pytest.approx((0.0, 0.0, 0.0))
    assert (free.adds.mean, dear.adds.mean, dearest.adds.mean) == pytest.approx((0.1, 0.1, 0.0))
    every = worth(table)
    assert every.net == pytest.approx((0.0, 0.35 / 3, 0.55 / 3))
    assert every.adds.mean == pytest.approx(0.2 / 3)
    assert every.net_se == pytest.approx((0, 0, 0), abs=1e-12)


def test_contexts_are_accepted_if_choosing_is_worth_enough_for_certain():
    assert worth(by_hand()).accepted
    assert not worth(by_hand(), 2).accepted
    # The mean is as high, the interval reaches lower.
    unsure = worth(by_hand(luck=0.3))
    assert unsure.adds.low <= LEAST
    assert not unsure.accepted
    assert (ASKED, LEAST) == (0.03, 0.02)


def test_luck_is_not_taken_for_skill():
    """Plans without effect, chosen by luck: on fresh starts none of them is worth anything."""
    player = KnownPlayer(np.zeros((*SHAPE[:2], EPISODES)), np.zeros(EPISODES), luck=1.0)
    table = known_headroom(player, headroom_config(starts=200))
    picked = np.take_along_axis(table.found.net(0.0), table.chosen_VWCP[Way.BY_CONTEXT], 2)
    assert picked.mean() > 0.15
    assert abs(worth(table).net[Way.BY_CONTEXT]) < 0.12
    assert not worth(table).accepted


def test_what_was_chosen_on_some_starts_is_scored_on_others():
    player = KnownPlayer(np.zeros((*SHAPE[:2], EPISODES)), np.zeros(EPISODES), luck=1.0)
    table = known_headroom(player)
    starts = [{*episodes.start_R.tolist()} for episodes in player.asked]
    chosen, scored = set().union(*starts[: -len(WIDTHS)]), set().union(*starts[-len(WIDTHS) :])
    assert scored == {*range(SCORE.start, SCORE.start + STARTS)}
    assert min(chosen) == CHOICE.start
    assert max(chosen) < REPLAY.start < SCORE.start < EXAM.start
    assert table.gain_VWKCP.shape == (len(Way), SHAPE[0], STARTS, *SHAPE[1:])
    assert table.episodes == sum(len(episodes) for episodes in player.asked[: -len(WIDTHS)]) <= EPISODES


def test_the_table_adds_up():
    """Each score is that of the plan that was chosen there, and of nothing else."""
    table = small_headroom()
    generator = np.random.default_rng(0)
    gain_WCN = generator.uniform(0, 0.2, (*SHAPE[:2], EPISODES))
    gain_WCN[..., 0] = 0
    cost_N = np.random.default_rng(1).uniform(0, 1.5, EPISODES)
    cost_N[0] = 0
    for v, w, c, p in np.ndindex(table.chosen_VWCP.shape):
        number = table.chosen_VWCP[v, w, c, p]
        np.testing.assert_allclose(table.gain_VWKCP[v, w, :, c, p], gain_WCN[w, c, number], atol=0.06)
        np.testing.assert_array_equal(table.cost_VWKCP[v, w, :, c, p], cost_N[number])
    np.testing.assert_allclose(table.net_VWKCP, table.gain_VWKCP - np.array(PRICES) * table.cost_VWKCP)
    found = worth(table)
    assert found.net[Way.SINGLE] < found.net[Way.BY_PRICE] < found.net[Way.BY_CONTEXT]
    np.testing.assert_allclose(found.net, table.net_VWKCP.mean((1, 2, 3, 4)))
    np.testing.assert_allclose(np.mean([worth(table, p).net for p in range(len(PRICES))], 0), found.net)
