"""One controller playing every row of a population, and contexts that are named one by one.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from esper.leyline.config import PopulationConfig
from esper.leyline.view import Controller
from esper.simic.contexts import Contexts
from esper.simic.episode import Episode
from esper.simic.step import Step
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.evaluation import evaluate
from esper.tolaria.tasks import Task


def chosen_contexts(conditions: Sequence[tuple[float, float]], start_R: Tensor, condition_R: Tensor) -> Contexts:
    """Contexts of rows that are named one by one, at price 0; no row has a twin, and every row may grow.

    Parameters
    ----------
    conditions
        Learning rate and label noise of each condition.
    start_R, condition_R
        Int64: the start of each row, and the number of its condition.
    """
    every_R = torch.arange(len(start_R), device=start_R.device)
    rate_R, noise_R = torch.tensor(conditions, device=start_R.device)[condition_R].unbind(1)
    grows_R = torch.ones_like(every_R, dtype=torch.bool)
    return Contexts(start_R, every_R, every_R, grows_R, torch.zeros_like(rate_R), rate_R, noise_R)


class Recorder(Protocol):
    """Takes down one round: see `simic.recorder.RoundRecorder`."""

    def decision(self, step: Step) -> None:
        """Take down a decision."""

    def end(self, status: str, results: Mapping[str, Any]) -> None:
        """Take down how the episodes ended."""


@dataclass(frozen=True)
class Played:
    """How a population ended, all [R].

    Attributes
    ----------
    loss, accuracy
        On the split that was asked for (nats, share).
    cost, added
        ln(1 + added / host parameters), and the parameters of the committed seeds.
    """

    loss: np.ndarray
    accuracy: np.ndarray
    cost: np.ndarray
    added: np.ndarray


def play(
    config: PopulationConfig,
    task: Task,
    contexts: Contexts,
    make: Callable[[Episode], Controller],
    pick: Callable[[Dataset], Split],
    *,
    recorder: Callable[[Episode], Recorder | None] | None = None,
    told: Callable[[int], None] | None = None,
) -> Played:
    """Let a controller grow a whole population, and measure how it ends.

    Parameters
    ----------
    make
        Gives the controller.
    pick
        Gives the split to measure on.
    recorder
        Makes what records the round; None: nothing does.
    told
        Told the number of each decision that was made.
    """
    rows_R = torch.arange(len(contexts.start_id_R), device=config.device)
    episode = Episode(config, task, "never", rows_R, contexts=contexts)
    episode.controller = make(episode)
    record = recorder and recorder(episode)
    while not episode.done:
        step = episode.advance(record=record is not None)
        if record is not None and step is not None:
            record.decision(step)
        if told is not None:
            told(episode.decision)
    population = episode.population
    evaluation = evaluate(population, pick(task.data))
    added_R = (population.slots.parameters * population.slots.blended_RS()).sum(1)
    cost_R = torch.log1p(added_R / task.host.body.parameter_count)
    columns = (evaluation.loss_R, evaluation.accuracy_R, cost_R, added_R)
    played = Played(*torch.stack([column_R.double() for column_R in columns]).cpu().numpy())
    if record is not None:
        record.decision(episode.step())
        of_test = {"test_loss_nats": played.loss, "test_accuracy": played.accuracy}
        record.end("finished", of_test if pick(task.data) is task.data.test else {})
    return played
