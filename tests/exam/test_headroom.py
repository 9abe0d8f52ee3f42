"""The table of schedules: what stands in it, and what is read off it."""

import numpy as np
import pytest
import torch

from esper.exam.grid import CHOICE_STARTS, conditions, grid, play
from esper.exam.headroom import Headroom, price_lines
from esper.exam.schedules import Plan
from esper.leyline.actions import Blueprint
from esper.leyline.config import ContextConfig
from esper.tamiyo.controllers.schedule import ScheduleController
from helpers.exams import NOISE, PRICES, RATES, STARTS, WIDTHS, exam_tasks, headroom_config, small_headroom

NOOP, NORM, SMALL = Blueprint.NOOP, Blueprint.NORM, Blueprint.MLP_SMALL


@pytest.fixture(scope="module")
def table():
    return small_headroom()


def test_every_plan_in_every_context(table):
    # Two blueprints in seven sets of slots at three starts, two mixtures, nothing.
    assert table.gain_WKCN.shape == table.cost_WKCN.shape == (len(WIDTHS), STARTS, 4, 45)
    assert table.conditions == tuple((rate, noise) for rate in RATES for noise in NOISE)
    assert np.isfinite(table.gain_WKCN).all()
    # Growing nothing gains and costs nothing; all else costs, and does something.
    assert (table.gain_WKCN[..., 0] == 0).all()
    assert (table.cost_WKCN[..., 0] == 0).all()
    assert (table.cost_WKCN[..., 1:] > 0).mean() > 0.6
    assert (table.gain_WKCN[..., 1:] != 0).mean() > 0.6


def test_a_cell_is_what_the_plan_does_alone(table):
    """One plan, one start, one width by itself: the loss it ends with, against that of growing nothing."""
    config, (_, task) = headroom_config(), exam_tasks()
    plan, start, condition = 9, 1, 2
    alone = ContextConfig(learning_rates=RATES[1:], label_noise=NOISE[:1])
    contexts = grid(alone, torch.tensor([CHOICE_STARTS + start]), (0.0,), 4)
    assert conditions(config.contexts)[condition] == (RATES[1], NOISE[0])
    blueprint_RS = torch.tensor([[int(b) for b in table.plans[p].blueprints] for p in (0, plan, 0, plan)])
    start_RS = torch.full_like(blueprint_RS, table.plans[plan].start)
    ended = play(
        config, task, contexts, lambda _: ScheduleController(blueprint_RS, start_RS), lambda data: data.selection
    )
    gain, cost = ended.loss[0] - ended.loss[1], ended.cost[1]
    assert gain == pytest.approx(table.gain_WKCN[1, start, condition, plan], abs=1e-4)
    assert cost == pytest.approx(table.cost_WKCN[1, start, condition, plan], abs=1e-6)
    parameters = task.host.body.parameter_count
    assert cost == pytest.approx(np.log1p(ended.added[1] / parameters))


def made_by_hand():
    """One width, four starts, two conditions, three plans: nothing; good in the first condition; in the second."""
    plans = tuple(Plan(blueprints, 0) for blueprints in ((NOOP,), (NORM,), (SMALL,)))
    gain_WKCN = np.zeros((1, 4, 2, 3))
    gain_WKCN[0, :, 0, 1], gain_WKCN[0, :, 1, 1] = 0.4, 0.1
    gain_WKCN[0, :, 0, 2], gain_WKCN[0, :, 1, 2] = 0.0, 0.3
    cost_WKCN = np.broadcast_to(np.array([0.0, 1.0, 1.0]), gain_WKCN.shape)
    return Headroom(plans, ("r0c0",), (1.0,), ((0.1, 0.0), (0.1, 0.4)), gain_WKCN, cost_WKCN)


def test_what_choosing_is_worth():
    """NORM gives (.4 + .1)/2 = .25, by context (.4 + .3)/2 = .35; at .15 it is .10 and .20; at 1, nothing pays."""
    free, dear, dearest = price_lines(made_by_hand(), (0.0, 0.15, 1.0))
    assert (free.best.blueprints, free.different) == ((NORM,), (1, 2))
    assert (free.best_net, free.single, free.by_width, free.by_context) == pytest.approx((0.25, 0.25, 0.25, 0.35))
    assert (free.choosing, free.choosing_se) == pytest.approx((0.1, 0.0), abs=1e-12)
    assert (dear.single, dear.by_context, dear.choosing) == pytest.approx((0.1, 0.2, 0.1))
    assert (dearest.best.blueprints, dearest.different) == ((NOOP,), (0, 2))
    assert (dearest.single, dearest.by_context, dearest.choosing) == (0, 0, 0)


def test_luck_is_not_taken_for_skill():
    """Two hundred plans of pure noise: the best on one half of the starts is worth nothing on the other."""
    generator = np.random.default_rng(0)
    gain_WKCN = generator.normal(0, 1, (1, 8, 6, 200))
    gain_WKCN[..., 0] = 0
    plans = (Plan((NOOP,), 0), *(Plan((NORM,), n) for n in range(199)))
    table = Headroom(plans, ("r0c0",), (1.0,), ((0.1, 0.0),) * 6, gain_WKCN, np.zeros_like(gain_WKCN))
    (line,) = price_lines(table, (0.0,))
    picked = gain_WKCN.mean(1).max(-1).mean()
    assert picked > 0.8
    assert abs(line.by_context) < 0.4
    assert abs(line.single) < 0.4


def test_prices_only_change_what_is_subtracted(table):
    np.testing.assert_allclose(table.net(0.0), table.gain_WKCN)
    np.testing.assert_allclose(table.net(0.3), table.gain_WKCN - 0.3 * table.cost_WKCN)
    free, priced = price_lines(table, PRICES)
    assert priced.best_net < free.best_net
