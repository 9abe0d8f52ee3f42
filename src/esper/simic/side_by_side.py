"""Several populations as one environment: different hosts cannot share a table, but can share a policy.

Shapes: R rows of all populations, one population after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

from esper.leyline.config import TrainConfig
from esper.leyline.view import Scores, check_actions
from esper.simic.contexts import Contexts
from esper.simic.environment import Balance, GridEnvironment, GrowthEnvironment, Payment, Situation
from esper.tamiyo.policy.observation import Observation
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.tasks import Task

OfRows = TypeVar("OfRows", Contexts, Scores, Observation, Balance)
_OF_ROWS = ("op_RO", "slot_ROS", "gradual_RS")
"""Masks of rows; the others are the same for every row of a kind of host."""


class SideBySide:
    """Growth environments that begin, decide and end together; see `Environment`.

    Parameters
    ----------
    parts
        Of the same horizon, with the same slots and the same blueprints that fit them.

    Raises
    ------
    ValueError
        They differ in what a policy's actions mean.
    """

    contexts: Contexts

    def __init__(self, parts: Sequence[GrowthEnvironment]) -> None:
        self.parts = tuple(parts)
        first, *others = self.parts
        self.horizon, self.slots = first.horizon, first.slots
        if any((part.horizon, part.kinds) != (first.horizon, first.kinds) for part in others):
            raise ValueError("populations side by side need the same horizon and the same kinds of sites")
        ends = [*accumulate(part.rows for part in self.parts)]
        self.rows = ends[-1]
        self.slices = [slice(end - part.rows, end) for part, end in zip(self.parts, ends, strict=True)]

    def reset(self, number: int) -> Situation:
        """Begin an episode of every part."""
        situations = [part.reset(number) for part in self.parts]
        contexts, groups = [], 0
        for part, rows in zip(self.parts, self.slices, strict=True):
            own = part.contexts
            contexts.append(replace(own, group_R=own.group_R + groups, twin_R=own.twin_R + rows.start))
            groups += part.groups
        self.contexts = _joined(contexts)
        return _together(situations)

    def set_price_share(self, share: float) -> None:
        """Set what the prices of the episodes that are yet to begin are multiplied by."""
        for part in self.parts:
            part.price_share = share

    def situation(self) -> Situation:
        """Look at the hosts of every part."""
        return _together([part.situation() for part in self.parts])

    def step(self, action_RH: Tensor, scores: Scores | None = None, flag: Tensor | None = None) -> Payment:
        """Perform one decision in every part.

        Raises
        ------
        InvalidStateMachineError, EsperError
            What the flag says.
        ValueError
            The actions have another shape or dtype.
        """
        check_actions(action_RH, self.rows)
        payments = [
            part.step(action_RH[rows], scores and Scores(scores.log_prob_RH[rows], scores.value_R[rows]), flag)
            for part, rows in zip(self.parts, self.slices, strict=True)
        ]
        first = payments[0]
        return Payment(
            reward_R=torch.cat([payment.reward_R for payment in payments]),
            parts={name: torch.cat([payment.parts[name] for payment in payments]) for name in first.parts},
            over_R=torch.cat([payment.over_R for payment in payments]),
            done=first.done,
            steps=tuple(step for payment in payments for step in payment.steps),
        )

    def balance(self, pick: Callable[[Dataset], Split]) -> Balance:
        """What growth has been worth so far, by a split of each part's data."""
        return _joined([part.balance(pick) for part in self.parts])


def populations(config: TrainConfig, tasks: Sequence[Task], *, record: bool = False) -> SideBySide:
    """Give the populations of a training round, one for each host.

    Parameters
    ----------
    tasks
        The tasks with a host of each width.
    record
        See `GrowthEnvironment`.
    """
    groups = config.groups // len(tasks)
    return SideBySide(
        [
            GrowthEnvironment(
                config,
                task,
                config.contexts,
                config.objective,
                groups=groups,
                size=config.group_size,
                first_group=number * groups,
                gamma=config.ppo.gamma,
                record=record,
            )
            for number, task in enumerate(tasks)
        ]
    )


def evaluations(config: TrainConfig, tasks: Sequence[Task], start_S: Tensor, *, record: bool = False) -> SideBySide:
    """Give populations that evaluate a policy, one for each task and width: see `GridEnvironment`.

    Parameters
    ----------
    tasks, record
        As `populations`.
    start_S
        Int64: the starts, the same for every population.
    """
    return SideBySide(
        [
            GridEnvironment(
                config, task, config.contexts, config.objective, start_S, gamma=config.ppo.gamma, record=record
            )
            for task in tasks
        ]
    )


def _joined(of_rows: Sequence[OfRows]) -> OfRows:
    """Concatenate records whose fields are all of rows."""
    kind = type(of_rows[0])
    return kind(**{field.name: torch.cat([getattr(one, field.name) for one in of_rows]) for field in fields(kind)})


def _together(situations: Sequence[Situation]) -> Situation:
    first = situations[0].masks
    masks = {name: torch.cat([getattr(situation.masks, name) for situation in situations]) for name in _OF_ROWS}
    return Situation(_joined([situation.observation for situation in situations]), replace(first, **masks))
