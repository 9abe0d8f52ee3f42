"""Cells: so many episodes as run best in one population, each cell a file once it has ended.

cells/00000.json    the first, and so on, in the order in which they are played

A file is renamed into place. A search that was stopped or killed goes on behind the last whole one, with the same
numbers, because what a cell plays follows from the configuration and from the cells before it.

Shapes: R rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from esper.exam.grid import chosen_contexts, play
from esper.exam.plans import Plan, plan_table
from esper.leyline.config import HeadroomConfig
from esper.leyline.errors import EsperError
from esper.leyline.files import digest, write_atomic
from esper.leyline.sealed import Sealed
from esper.simic.contexts import conditions
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.simic.run_folder import CELLS
from esper.tamiyo.controllers.plan import PlanController
from esper.tolaria.tasks import Task

ROWS = 384
"""Rows of a cell; benchmarked on one core: more gain nothing, and a search that was killed loses one cell."""


class _Ended(Sealed):
    played: str
    """Checksum of what was played."""
    loss_nats: tuple[float, ...]
    cost: tuple[float, ...]


@dataclass(frozen=True)
class Episodes:
    """Which plan is played by hosts of one shape, from which starts and in which conditions; index arrays [R].

    Attributes
    ----------
    host
        Number of the host.
    """

    host: int
    start_R: np.ndarray
    condition_R: np.ndarray
    plan_R: np.ndarray

    def __len__(self) -> int:
        return len(self.plan_R)

    def part(self, rows: slice) -> Episodes:
        """Some of them."""
        return Episodes(self.host, self.start_R[rows], self.condition_R[rows], self.plan_R[rows])


class Cells:
    """Plays episodes cell by cell.

    Parameters
    ----------
    folder
        Of the run; whole cells that are there are not played again.
    config, tasks
        The run, and its task with a host of each shape.
    plans
        All plans, by number.
    recorder
        Gives what records a population, by the number of its cell; None: nothing does.
    told
        Told after every decision how many episodes were played since this began.

    Attributes
    ----------
    kept_episodes
        Of the cells that were there.
    """

    def __init__(
        self,
        folder: Path,
        config: HeadroomConfig,
        tasks: Sequence[Task],
        plans: Sequence[Plan],
        *,
        recorder: Callable[[Episode, int], RoundRecorder | None] | None = None,
        told: Callable[[float], None] | None = None,
    ) -> None:
        self._folder, self._config, self._tasks = folder / CELLS, config, tasks
        self._plans, self._table_NKF = plans, plan_table(plans, config.device)
        self._recorder, self._told = recorder, told
        self._kept = kept_cells(folder)
        self.kept_episodes = sum(len(cell.cost) for cell in self._kept)
        self._number, self._played = 0, 0

    def play(self, episodes: Episodes) -> tuple[np.ndarray, np.ndarray]:
        """Give loss on the selection split (nats) and cost, ln(1 + added / host parameters), of every episode [R]."""
        starts = range(0, len(episodes), ROWS)
        ended = [self._cell(episodes.part(slice(first, first + ROWS))) for first in starts]
        return np.concatenate([cell.loss_nats for cell in ended]), np.concatenate([cell.cost for cell in ended])

    def _cell(self, episodes: Episodes) -> _Ended:
        """Play one cell, or find what it gave."""
        number, self._number = self._number, self._number + 1
        played = self._checksum(episodes)
        if number < len(self._kept):
            if self._kept[number].played != played or len(self._kept[number].loss_nats) != len(episodes):
                raise EsperError(
                    f"resume: {self._folder / _name(number)} is of another search; begin again with --out and --replace"
                )
            return self._kept[number]
        ended = self._run(episodes, number, played)
        self._folder.mkdir(exist_ok=True)
        write_atomic(self._folder / _name(number), ended.sealed().model_dump_json().encode())
        self._played += len(episodes)
        return ended

    def _run(self, episodes: Episodes, number: int, played: str) -> _Ended:
        config, recorder, told = self._config, self._recorder, self._told
        task, device = self._tasks[episodes.host], config.device
        start_R, condition_R, plan_R = (
            torch.from_numpy(index_R).to(device)
            for index_R in (episodes.start_R, episodes.condition_R, episodes.plan_R)
        )

        def each(decision: int) -> None:
            if told is not None:
                told(self._played + len(episodes) * decision / config.training.horizon)

        ended = play(
            config,
            task,
            chosen_contexts(conditions(config.contexts), start_R, condition_R),
            lambda episode: PlanController(self._table_NKF[plan_R], episode.population.slots.slots),
            lambda data: data.selection,
            recorder=recorder and (lambda episode: recorder(episode, number)),
            told=each,
        )
        return _Ended(played=played, loss_nats=tuple(ended.loss.tolist()), cost=tuple(ended.cost.tolist()))

    def _checksum(self, episodes: Episodes) -> str:
        plans = sorted({*episodes.plan_R.tolist()})
        table = self._table_NKF[torch.tensor(plans)].tolist()
        of = (episodes.host, *(index.tolist() for index in (episodes.start_R, episodes.condition_R, episodes.plan_R)))
        return digest(json.dumps([of, plans, table]).encode())


def kept_cells(folder: Path) -> list[_Ended]:
    """Read the cells of a folder up to the first that is missing or damaged."""
    found: list[_Ended] = []
    while True:
        try:
            cell = _Ended.model_validate_json((folder / CELLS / _name(len(found))).read_bytes())
        except (OSError, ValueError):
            return found
        if not cell.whole:
            return found
        found.append(cell)


def _name(number: int) -> str:
    return f"{number:05}.json"
