"""What a policy does most often, as a fixed plan: played beside the policy it shows what deciding is worth.

Shapes: K starts, C conditions, P prices; R = K*C*P rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from esper.exam.grid import play
from esper.exam.plans import MOST_SEEDS, NOTHING, Plan, Seed
from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Head, Op, Style
from esper.leyline.config import ContextConfig, PopulationConfig
from esper.leyline.stages import Stage
from esper.leyline.starts import REPLAY, start_ids
from esper.simic.contexts import grid
from esper.simic.step import Step
from esper.tamiyo.controllers.policy import PolicyController
from esper.tamiyo.policy.network import FactoredRecurrentActorCritic
from esper.tolaria.tasks import Task

STARTS = 4
"""On which a policy is watched, in every context."""


@dataclass(frozen=True)
class Modal:
    """What a policy does most often, over all contexts and at each price."""

    plan: Plan
    by_price: tuple[Plan, ...]


class Diary:
    """Takes down what is germinated and culled in each row.

    Attributes
    ----------
    seeds
        The seeds of each row so far, in the order in which they began.
    committed
        Slots [R, S] whose seed is committed.
    """

    def __init__(self, rows: int) -> None:
        self.seeds: list[list[Seed]] = [[] for _ in range(rows)]
        self.committed: np.ndarray = np.zeros((rows, 0), dtype=bool)

    def decision(self, step: Step) -> None:
        """Take down a decision."""
        for row in np.flatnonzero(step.accepted_R & np.isin(step.action_RH[:, Head.OP], (Op.GERMINATE, Op.CULL))):
            action, seeds = step.action_RH[row].tolist(), self.seeds[row]
            slot = action[Head.SLOT]
            if action[Head.OP] == Op.GERMINATE:
                tempo, target = TEMPOS[action[Head.TEMPO]], ALPHA_TARGETS[action[Head.ALPHA_TARGET]]
                what = Blueprint(action[Head.BLUEPRINT]), Style(action[Head.STYLE])
                seeds.append(Seed(slot, *what, tempo, target, step.decision))
            else:
                place = max(n for n, seed in enumerate(seeds) if seed.slot == slot)
                # One that is fading out was culled when the fading began.
                if seeds[place].cull is None:
                    seeds[place] = replace(seeds[place], cull=step.decision)
        self.committed = step.slots["stage"] == int(Stage.FOSSILIZED)

    def end(self, status: str, results: Mapping[str, Any]) -> None:
        """Nothing more is needed."""

    def plans(self) -> list[Plan]:
        """What each row did; of too many seeds those that were committed first, then those that came first."""
        return [self._plan(row) for row in range(len(self.seeds))]

    def _plan(self, row: int) -> Plan:
        seeds = self.seeds[row]
        stays = [seed.cull is None and bool(self.committed[row, seed.slot]) for seed in seeds]
        kept = sorted(range(len(seeds)), key=lambda n: (not stays[n], n))[:MOST_SEEDS]
        return Plan(tuple(seeds[n] for n in sorted(kept)))


def modal_plans(
    config: PopulationConfig, contexts: ContextConfig, tasks: Sequence[Task], policy: FactoredRecurrentActorCritic
) -> Modal:
    """Watch a policy, taking its most likely choices, in every context of every host."""
    start_K = start_ids(REPLAY, 0, STARTS, config.device)
    rows = grid(contexts, start_K, contexts.prices, 1)
    every_R = torch.arange(len(rows.start_id_R), device=config.device)
    diaries = [Diary(len(every_R)) for _ in tasks]
    for task, diary in zip(tasks, diaries, strict=True):
        play(
            config,
            task,
            rows,
            lambda _: PolicyController(policy, config.seed, every_R, greedy=True),
            lambda data: data.selection,
            recorder=lambda _, diary=diary: diary,  # type: ignore[misc]
        )
    plans, prices = [plan for diary in diaries for plan in diary.plans()], len(contexts.prices)
    return Modal(most_frequent(plans), tuple(most_frequent(plans[p::prices]) for p in range(prices)))


def most_frequent(plans: Sequence[Plan]) -> Plan:
    """Give the plan in the middle of the largest group.

    Plans of a group grow the same in the same slots; of the largest, those with the most frequent ramps are left, and
    of these the one whose times are nearest to the medians is given.
    """
    plans = _majority(plans, lambda plan: tuple((s.slot, s.blueprint, s.style, s.cull is None) for s in _by_slot(plan)))
    plans = _majority(plans, lambda plan: tuple((s.tempo, s.alpha_target) for s in _by_slot(plan)))
    if plans[0] == NOTHING:
        return NOTHING
    times = np.array([[(s.begin, s.begin if s.cull is None else s.cull) for s in _by_slot(plan)] for plan in plans])
    distance = np.abs(times - np.median(times, 0)).sum((1, 2))
    return plans[int(distance.argmin())]


def _by_slot(plan: Plan) -> list[Seed]:
    return sorted(plan.seeds, key=lambda seed: (seed.slot, seed.begin))


def _majority(plans: Sequence[Plan], of: Callable[[Plan], Hashable]) -> list[Plan]:
    """Those that share the most frequent of a property, of equals the one that comes first."""
    ((most, _),) = Counter(map(of, plans)).most_common(1)
    return [plan for plan in plans if of(plan) == most]
