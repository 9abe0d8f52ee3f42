"""What a search found, as a rule: the menu for each price, and the classifier of conditions."""

import numpy as np
import torch

from esper.exam.hedge import STARTS, choose_menu, fit, hedging, menus, watched_losses
from esper.exam.plans import NOTHING, Plan, Seed
from esper.leyline.actions import Blueprint, Head, Style
from esper.leyline.starts import FITTING
from esper.simic.contexts import conditions, grid
from esper.simic.episode import Episode
from helpers.exams import NOISE, PRICES, RATES, exam_tasks, headroom_config, small_headroom

NORM, MLP, OTHER = (
    Seed(slot, blueprint, Style.LINEAR_ADD)
    for slot, blueprint in ((0, Blueprint.NORM), (2, Blueprint.MLP_LARGE), (2, Blueprint.NORM))
)
LATE, BRIEF = Seed(1, Blueprint.NORM, Style.LINEAR_ADD, begin=5), Seed(1, Blueprint.NORM, Style.LINEAR_ADD, cull=9)
PLANS = (NOTHING, Plan((NORM,)), Plan((MLP,)), Plan((OTHER,)), Plan((NORM, MLP)), Plan((LATE,)), Plan((BRIEF,)))


def test_a_menu_is_worth_as_much_as_can_be_in_all_conditions():
    """The best in each condition, side by side, where they fit; the best of what shares a slot."""
    net_CN = np.array([[0, 0.3, -0.2, 0.1, -0.1, 9, 9], [0, -0.2, 0.3, 0.25, 0.1, 9, 9]])
    found = choose_menu(PLANS, net_CN, range(len(PLANS)))
    assert found.seeds == {NORM, MLP}
    assert found.plans == (0, 1, 2, 4)


def test_nothing_that_does_not_pay_is_on_the_menu():
    net_CN = np.array([[0, 0.3, -0.2, -0.1, 0.2, 0, 0], [0, 0.1, -0.3, -0.1, 0.1, 0, 0]])
    assert choose_menu(PLANS, net_CN, range(len(PLANS))).seeds == {NORM}
    assert choose_menu(PLANS, -np.abs(net_CN), range(len(PLANS))).plans == (0,)


def test_conditions_are_told_by_their_losses():
    generator = np.random.default_rng(0)
    condition_N = np.arange(300) % 3
    centre_CL = np.array([[1.0, 1.0, 1.0], [1.0, 1.5, 1.0], [2.0, 1.0, 1.0]])

    def drawn():
        # Two losses that vary together, so that only their difference tells.
        shared_N1 = generator.normal(0, 1, (300, 1))
        return centre_CL[condition_N] + np.concatenate((shared_N1, shared_N1, 0 * shared_N1), 1) + 0.05

    weight_LC, bias_C = fit(drawn() + generator.normal(0, 0.05, (300, 3)), condition_N)
    told_N = (drawn() @ weight_LC + bias_C).argmax(1)
    assert (told_N == condition_N).mean() > 0.95


def test_equal_losses_and_a_single_condition_can_be_fitted():
    weight_LC, bias_C = fit(np.ones((6, 2)), np.arange(6) % 2)
    assert np.isfinite(weight_LC).all()
    assert np.isfinite(bias_C).all()
    assert fit(np.ones((6, 2)), np.zeros(6, dtype=int))[0].shape == (2, 1)


def episode_of(config, start_id):
    rows = grid(config.contexts, torch.tensor([start_id]), PRICES, 1)
    return Episode(config, exam_tasks()[1], "never", torch.arange(len(rows.start_id_R)), contexts=rows)


def test_the_losses_that_are_fitted_to_are_those_of_hosts_that_incubate():
    """The same start grown by the rule: bit for bit the losses of the host that grows nothing, until it is judged."""
    config = headroom_config()
    episode = episode_of(config, FITTING.start)
    decisions = config.growth.gates.min_training_decisions + 1
    cells = conditions(config.contexts)
    watched_NL = watched_losses(episode, cells, decisions)
    assert watched_NL.shape == (STARTS * len(cells), 2 * decisions)
    episode.controller = hedging(small_headroom())(episode, 1)
    seen = []
    for _ in range(decisions):
        episode.advance()
        view = episode.view()
        seen += [view.train_loss_R, view.val_loss_R]
    assert (episode.population.slots.seed_id >= 0).any()
    seen_CPL = torch.stack(seen, 1).view(len(cells), len(PRICES), -1).double().numpy()
    # Kernels of another number of rows round otherwise.
    np.testing.assert_allclose(seen_CPL[:, 0], watched_NL[: len(cells)], rtol=1e-5)


def test_there_is_a_menu_for_each_price_of_seeds_that_its_plans_blend():
    headroom = small_headroom()
    for host in (0, 1):
        menu = menus(headroom, host, 3)
        assert menu.part_RMS.shape[0] == len(PRICES)
        assert menu.net_RMC.shape[2] == len(RATES) * len(NOISE)
        assert not menu.part_RMS[:, 0].any()
        planted_RS = menu.germination_RSH[:, :, Head.BLUEPRINT] != int(Blueprint.NOOP)
        assert (planted_RS == menu.part_RMS.any(1)).all()
        assert planted_RS.any()
