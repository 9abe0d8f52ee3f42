"""Small exams: few plans, few contexts, short episodes; and players whose results are known beforehand."""

from __future__ import annotations

from functools import cache

import numpy as np

from esper.exam.headroom import Headroom, measure
from esper.exam.plans import Family, candidates
from esper.exam.search import rungs
from esper.leyline.config import HeadroomConfig
from esper.simic.contexts import conditions
from helpers.episodes import OPEN_GATES, task_of

WIDTHS, PRICES, RATES, NOISE = (1.0, 0.5), (0.0, 0.3), (0.01, 0.03), (0.0, 0.4)
WORLD = {
    "task": "mnist1d-mlp",
    "blueprints": ("norm", "mlp_small"),
    "growth": OPEN_GATES.model_dump(),
    "training": {"horizon": 12, "updates_per_decision": 2, "batch_size": 8},
    "contexts": {"prices": PRICES, "learning_rates": RATES, "label_noise": NOISE, "host_widths": WIDTHS},
}
"""What policies and plans share."""
STARTS, EPISODES = 3, 2500


def headroom_config(**more) -> HeadroomConfig:
    return HeadroomConfig.model_validate({**WORLD, "starts": STARTS, "episodes": EPISODES, **more})


def exam_tasks():
    return [task_of("mnist1d-mlp", examples=40, width=width) for width in WIDTHS]


class KnownPlayer:
    """Plans of known gain and cost, seen through the luck of each episode.

    Parameters
    ----------
    gain_WCN, cost_N
        What each plan gains in each context, and what it costs.
    luck
        Standard deviation of an episode's loss.
    """

    def __init__(self, gain_WCN, cost_N, luck=0.0):
        self.gain_WCN, self.cost_N, self.luck = gain_WCN, np.asarray(cost_N), luck
        self.asked = []

    def play(self, episodes):
        self.asked.append(episodes)
        generator = np.random.default_rng(len(self.asked))
        of_start = np.sin(episodes.start_R + 10 * episodes.condition_R)
        gain = self.gain_WCN[episodes.host, episodes.condition_R, episodes.plan_R]
        loss = 3 + of_start - gain + self.luck * generator.normal(size=len(episodes))
        return loss, self.cost_N[episodes.plan_R]


def known_headroom(player, config=None, slots=None):
    """Search among plans whose results are known."""
    config = config or headroom_config()
    slots = slots or exam_tasks()[0].host.slot_config
    cells = len(WIDTHS) * len(conditions(config.contexts))
    family = Family.of(config, slots)
    ladder = rungs(config.episodes, cells, len(candidates(family, (), config.seed)))
    plans = candidates(family, (), config.seed, ladder[0].plans)
    return measure(config, plans, ladder, slots.slot_ids, player)


@cache
def small_headroom() -> Headroom:
    """A search in which each context has another best plan at price 0, and a cheaper one at the other."""
    gain_WCN = np.random.default_rng(0).uniform(0, 0.2, (len(WIDTHS), len(RATES) * len(NOISE), EPISODES))
    gain_WCN[..., 0] = 0
    cost_N = np.random.default_rng(1).uniform(0, 1.5, EPISODES)
    cost_N[0] = 0
    return known_headroom(KnownPlayer(gain_WCN, cost_N, luck=0.01))
