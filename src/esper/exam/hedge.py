"""Classify, then hedge, made of what a search found: a menu for each price, and a classifier of conditions.

This is how far one gets with a table and a linear rule; a learned policy has to be better (DESIGN of the exam).

Shapes: K starts, C conditions, P prices, L losses, M plans of a menu, S slots, R rows, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from esper.exam.grid import chosen_contexts
from esper.exam.headroom import Headroom
from esper.exam.plans import Plan, Seed
from esper.leyline.actions import ALPHA_TARGETS, HEAD_COUNT, TEMPOS, Head
from esper.leyline.starts import FITTING, start_ids
from esper.leyline.view import Controller
from esper.simic.episode import Episode
from esper.tamiyo.controllers.hedge import Classifier, HedgeController, Menu

STARTS = 32
"""On which hosts that grow nothing are watched in every condition, to fit the classifier."""
_RIDGE = 1e-3
"""Added to the variance of each loss (as a share of the mean variance), so that equal losses can be told apart too."""


@dataclass(frozen=True)
class Choice:
    """What to incubate at a price.

    Attributes
    ----------
    seeds
        At most one for each slot.
    plans
        Numbers of the plans that can be made of them, growing nothing first.
    """

    seeds: frozenset[Seed]
    plans: tuple[int, ...]


def choose_menu(plans: Sequence[Plan], net_CN: np.ndarray, finalists: Sequence[int]) -> Choice:
    """Choose seeds so that the best plan that can be made of them is worth as much as can be, mean over conditions.

    Plans are added one after the other, each time the one that adds most, as long as their seeds fit beside each other.

    Parameters
    ----------
    net_CN
        What each plan is worth in each condition (nats).
    finalists
        Plans that may be chosen, growing nothing first; those that begin later than at once, or cull, are left out.
    """
    parts = {n: frozenset(plans[n].seeds) for n in finalists}
    able = {n: part for n, part in parts.items() if all(s.begin == 0 and s.cull is None for s in part) and _fits(part)}

    def made_of(seeds: frozenset[Seed]) -> tuple[int, ...]:
        return tuple(n for n, part in able.items() if part <= seeds)

    def worth(seeds: frozenset[Seed]) -> float:
        return float(net_CN[:, made_of(seeds)].max(1).mean())

    menu, best = frozenset[Seed](), -np.inf
    while True:
        wider = max((menu | part for part in able.values() if _fits(menu | part)), key=worth)
        if worth(wider) <= best:
            return Choice(menu, made_of(menu))
        menu, best = wider, worth(wider)


def _fits(seeds: frozenset[Seed]) -> bool:
    """No two seeds are in the same slot."""
    return len({seed.slot for seed in seeds}) == len(seeds)


def fit(loss_NL: np.ndarray, condition_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Linear discriminant analysis with one covariance for all conditions (Fisher 1936), each as likely.

    Returns
    -------
    tuple
        Weights [L, C] and biases [C] of the log-probabilities.
    """
    count = int(condition_N.max()) + 1
    mean_CL = np.stack([loss_NL[condition_N == c].mean(0) for c in range(count)])
    rest_NL = loss_NL - mean_CL[condition_N]
    covariance_LL = rest_NL.T @ rest_NL / max(len(rest_NL) - count, 1)
    covariance_LL += _RIDGE * np.eye(len(covariance_LL)) * max(np.diag(covariance_LL).mean(), _RIDGE)
    weight_LC = np.linalg.solve(covariance_LL, mean_CL.T)
    return weight_LC, -0.5 * (mean_CL.T * weight_LC).sum(0)


def watched_losses(episode: Episode, conditions: Sequence[tuple[float, float]], decisions: int) -> np.ndarray:
    """Losses [K * C, L] of hosts like those of an episode, in every condition, that grow nothing.

    A seed in the incubator changes nothing about its host, so that these are the losses of hosts that incubate, too.
    """
    device = episode.population.device
    start_R = start_ids(FITTING, 0, STARTS, device).repeat_interleave(len(conditions))
    condition_R = torch.arange(len(conditions), device=device).repeat(STARTS)
    contexts = chosen_contexts(conditions, start_R, condition_R)
    watched = Episode(episode.config, episode.task, "never", torch.arange(len(start_R)), contexts=contexts)
    losses = []
    for _ in range(decisions):
        watched.advance()
        view = watched.view()
        losses += [view.train_loss_R, view.val_loss_R]
    return torch.stack(losses, 1).nan_to_num(0.0, 0.0, 0.0).double().cpu().numpy()


def hedging(headroom: Headroom) -> Callable[[Episode, int], Controller]:
    """Give what makes the controller for a population of one host, whose number is told; it sees prices."""

    def make(episode: Episode, host: int) -> Controller:
        population = episode.population
        decisions = episode.config.growth.gates.min_training_decisions + 1
        loss_NL = watched_losses(episode, headroom.conditions, decisions)
        tables = fit(loss_NL, np.tile(np.arange(len(headroom.conditions)), STARTS))
        weight_LC, bias_C = (torch.from_numpy(t).float().to(population.device) for t in tables)
        menu_P = menus(headroom, host, population.slots.slots)
        price_R = torch.arange(population.rows) % len(headroom.prices)
        menu = Menu(**{name: table[price_R].to(population.device) for name, table in vars(menu_P).items()})
        return HedgeController(menu, Classifier(weight_LC, bias_C))

    return make


def menus(headroom: Headroom, host: int, slots: int) -> Menu:
    """Make a row for each price."""
    choices, nets = [], []
    for price in headroom.prices:
        net_CN = headroom.found.net(price)[host]
        choices.append(choose_menu(headroom.plans, net_CN, headroom.found.finalists.tolist()))
        nets.append(net_CN)
    most = max(len(choice.plans) for choice in choices)
    germination_PSH = torch.zeros(len(choices), slots, HEAD_COUNT, dtype=torch.int64)
    part_PMS = torch.zeros(len(choices), most, slots, dtype=torch.bool)
    net_PMC = torch.full((len(choices), most, len(headroom.conditions)), -1e9)
    for p, (choice, net_CN) in enumerate(zip(choices, nets, strict=True)):
        for seed in choice.seeds:
            germination_PSH[p, seed.slot] = _germination(seed)
        for m, number in enumerate(choice.plans):
            part_PMS[p, m, [seed.slot for seed in headroom.plans[number].seeds]] = True
            net_PMC[p, m] = torch.from_numpy(net_CN[:, number])
    return Menu(germination_PSH, part_PMS, net_PMC)


def _germination(seed: Seed) -> torch.Tensor:
    action_H = torch.zeros(HEAD_COUNT, dtype=torch.int64)
    action_H[Head.BLUEPRINT], action_H[Head.STYLE] = int(seed.blueprint), int(seed.style)
    action_H[Head.TEMPO] = TEMPOS.index(seed.tempo)
    action_H[Head.ALPHA_TARGET] = ALPHA_TARGETS.index(seed.alpha_target)
    return action_H
