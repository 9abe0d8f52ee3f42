"""Growing a population as a problem for a policy: observations, masks and rewards, as tensors on the device.

Shapes: R rows, S slots, H heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from esper.leyline.actions import Head, Op
from esper.leyline.config import ContextConfig, ObjectiveConfig, PopulationConfig
from esper.leyline.stages import Stage
from esper.leyline.view import PopulationView, Scores
from esper.simic.contexts import Contexts, conditions, draw_contexts, grid
from esper.simic.episode import Episode
from esper.simic.objective import Appraiser, Objective, Standing, check_gamma
from esper.simic.step import Step
from esper.tamiyo.controllers.base import PlainController
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.observation import Observation, Observer
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.evaluation import Evaluation, evaluate
from esper.tolaria.tasks import Task


@dataclass(frozen=True)
class Situation:
    """What there is to decide on, for every row. The masks are filled anew at the next decision."""

    observation: Observation
    masks: ActionMasks


@dataclass(frozen=True)
class Payment:
    """What a decision brought.

    Attributes
    ----------
    reward_R
        Sum of the parts.
    parts
        By term of the objective, [R] each.
    over_R
        Bool: the row's episode broke off, now or earlier, because the governor rolled the row back, or its twin.
        Nothing more is paid to it, and nothing that it still does counts.
    done
        The episode is over, for every row.
    steps
        Records of the decision before, one for each population, if they were asked for.
    """

    reward_R: Tensor
    parts: dict[str, Tensor]
    over_R: Tensor
    done: bool
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Balance:
    """What growth has been worth by some examples, after the last decision by those of the harvest; all [R].

    Attributes
    ----------
    net_R, gain_R
        Lead over the twin (nats, or accuracy), with and without the rent taken off.
    added_R
        Parameters grown.
    loss_R, accuracy_R
        Measured on the examples.
    """

    net_R: Tensor
    gain_R: Tensor
    added_R: Tensor
    loss_R: Tensor
    accuracy_R: Tensor


class Environment(Protocol):
    """What a policy can learn in: episodes of a fixed number of decisions, many rows at once.

    Attributes
    ----------
    horizon, rows, slots
        Decisions of an episode, rows of a population, slots of a row.
    contexts
        Of the present episode.
    """

    horizon: int
    rows: int
    slots: int
    contexts: Contexts

    def reset(self, number: int) -> Situation:
        """Begin an episode; its number decides everything that is drawn for it."""

    def step(self, action_RH: Tensor, scores: Scores | None = None, flag: Tensor | None = None) -> Payment:
        """Perform one decision."""

    def situation(self) -> Situation:
        """Give what is to be decided on next."""


class Given(PlainController):
    """Does as it is told from outside, and gives the flag and the scores that it was told."""

    def __init__(self) -> None:
        self.action_RH = torch.empty(0)

    def observe(self, view: PopulationView) -> None:
        """Whoever tells it has looked already."""

    def act(self) -> Tensor:
        """What it was told."""
        return self.action_RH


class GrowthEnvironment:
    """Real hosts on a task, in groups with a twin.

    Parameters
    ----------
    config
        The run: training, optimizer, growth, seed and device; prices and learning rates come from the contexts.
    task
        Its task, loaded.
    contexts
        What the groups of a round differ in.
    objective
        What is paid for.
    groups, size
        Groups of a population, and rows of a group, the twin included.
    first_group
        Groups of other populations that learn beside it, and have the numbers before its own.
    gamma
        The learner's discount.
    record
        Give a `Step` for every decision.

    Attributes
    ----------
    price_share
        What the prices of the episodes that are yet to begin are multiplied by.

    Raises
    ------
    ValueError
        See `check_gamma`.
    """

    contexts: Contexts
    episode: Episode
    objective: Objective
    _observer: Observer
    _masks: ActionMasks

    def __init__(
        self,
        config: PopulationConfig,
        task: Task,
        contexts: ContextConfig,
        objective: ObjectiveConfig,
        *,
        groups: int,
        size: int,
        first_group: int = 0,
        gamma: float = 1.0,
        record: bool = False,
    ) -> None:
        check_gamma(objective, gamma)
        self.task, self.groups = task, groups
        self._config, self._context_config = config, contexts
        self._objective_config, self._gamma, self._record = objective, gamma, record
        self._size, self._first_group = size, first_group
        self.price_share = 1.0
        self.rows, self.slots = groups * size, task.host.slot_config.slots
        self.horizon = config.training.horizon
        self.kinds = tuple(site.kind for site in task.host.slot_config.sites)
        guess = math.log(task.data.classes)
        self._appraiser = Appraiser(objective, task.host.body.parameter_count, guess, config.device)
        self._given = Given()

    def reseed(self, seed: int) -> None:
        """Set the seed of the run for the episodes that are yet to begin."""
        self._config = self._config.model_copy(update={"seed": seed})

    def reset(self, number: int) -> Situation:
        """Begin the episode of a round."""
        config = self._config
        self.contexts = self.draw(number)
        ids_R = torch.arange(self.rows, device=config.device)
        self.episode = Episode(config, self.task, "never", ids_R, contexts=self.contexts)
        self.episode.controller = self._given
        population = self.episode.population
        self.objective = Objective(self._objective_config, self.contexts, self._gamma)
        self.objective.begin(self._standing(evaluate(population, self.task.data.reward_validation)))
        self._observer = Observer(self.rows, self.task.host.slot_config, population.device)
        self._masks = ActionMasks.empty(self.rows, population.fits_SB)
        return self.situation()

    def draw(self, number: int) -> Contexts:
        """Contexts of an episode."""
        config = self._config
        return draw_contexts(
            self._context_config,
            config.seed,
            number,
            self.groups,
            self._size,
            config.device,
            first=self._first_group,
            price_share=self.price_share,
        )

    def balance(self, pick: Callable[[Dataset], Split]) -> Balance:
        """What growth has been worth so far, by a split of the task's data."""
        evaluation = evaluate(self.episode.population, pick(self.task.data))
        standing = self._standing(evaluation)
        net_R, gain_R = self.objective.net(standing), self.objective.lead(standing)
        return Balance(net_R, gain_R, standing.added_R, evaluation.loss_R, evaluation.accuracy_R)

    def _standing(self, evaluation: Evaluation) -> Standing:
        """Where the hosts stand by an evaluation, nothing having been done just now."""
        nobody_R = torch.zeros(self.rows, dtype=torch.bool, device=self.episode.population.device)
        return self._appraiser.standing(
            self.episode.population.slots,
            evaluation.loss_R,
            evaluation.accuracy_R,
            nobody_R[:, None],
            nobody_R,
            self.episode.governor.retired_R,
            self.horizon - self.episode.decision,
        )

    def situation(self) -> Situation:
        """Look at the hosts; once for each decision, for what is seen has a memory."""
        observation = self._observer.observe(self.episode.view())
        return Situation(observation, compute_batch_masks(self.episode.population.slots, self._masks))

    def step(self, action_RH: Tensor, scores: Scores | None = None, flag: Tensor | None = None) -> Payment:
        """Perform one decision, train, measure, pay.

        Raises
        ------
        InvalidStateMachineError, EsperError
            What the flag says.
        ValueError
            The actions have another shape or dtype.
        """
        given, episode, slots = self._given, self.episode, self.episode.population.slots
        given.action_RH, given.scores, given.flag = action_RH, scores, flag
        committed_RS = slots.stage == int(Stage.FOSSILIZED)
        step = episode.advance(record=self._record)
        view = episode.view()
        standing = self._appraiser.standing(
            slots,
            view.val_loss_R,
            view.val_accuracy_R,
            (slots.stage == int(Stage.FOSSILIZED)) & ~committed_RS,
            (action_RH[:, Head.OP] != int(Op.WAIT)) & self.contexts.grows_R,
            episode.governor.retired_R,
            self.horizon - episode.decision,
        )
        episode.reward = parts = self.objective.pay(standing)
        reward_R = torch.stack(list(parts.values())).sum(0)
        return Payment(reward_R, parts, self.objective.over_R, episode.done, () if step is None else (step,))


class GridEnvironment(GrowthEnvironment):
    """Every context on the same starts in every episode, one learner in each: what a policy is evaluated in.

    Learners of a group differ in their price, so that no two of them meet the same host in the same context: a policy
    that takes its most likely choices would only repeat itself there.

    Parameters
    ----------
    start_S
        Int64: the starts.
    """

    def __init__(
        self,
        config: PopulationConfig,
        task: Task,
        contexts: ContextConfig,
        objective: ObjectiveConfig,
        start_S: Tensor,
        *,
        gamma: float = 1.0,
        record: bool = False,
    ) -> None:
        groups = len(start_S) * len(conditions(contexts))
        size = 1 + len(contexts.prices)
        super().__init__(config, task, contexts, objective, groups=groups, size=size, gamma=gamma, record=record)
        self._start_S = start_S

    def draw(self, number: int) -> Contexts:
        """See `grid`."""
        return grid(self._context_config, self._start_S, self._context_config.prices, twins=True)
