"""A grow run: its arms in order, kept so that a run that was stopped or killed goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from esper.leyline.config import RunConfig
from esper.nissa.store import RunStore
from esper.nissa.writer import Kept
from esper.simic.checkpoint import episode_parts, restore_episode
from esper.simic.grow import ARMS, GROWN, ROW, Arm, ArmResult, DecisionLine
from esper.simic.run_folder import RunFolder
from esper.simic.story import Event
from esper.tolaria.checkpoints import Checkpoint, Checkpoints
from esper.tolaria.tasks import Task

KIND = "grow"
"""Kind of the checkpoints of a grow run."""
SAVE_EVERY_S = 10.0
"""Seconds between two checkpoints of an arm: what a kill costs at most."""


class GrowRun:
    """Trains the arms of one run, from the start or from where it was.

    Parameters
    ----------
    config, task
        The run.
    checkpoint
        Where to go on; None: from the start.

    Attributes
    ----------
    arm
        The arm that trains, or trained last.
    results
        Of the arms that are finished, in order.

    Raises
    ------
    EsperError
        The configuration cannot work.
    ValueError
        The checkpoint is not of such a run.
    """

    def __init__(self, config: RunConfig, task: Task, checkpoint: Checkpoint | None = None) -> None:
        self.config, self.task = config, task
        self._names = list(ARMS)
        self.results: list[ArmResult] = []
        self._number, self._recorded_unix_s = 0, 0.0
        if checkpoint is None:
            self.arm = Arm(config, task, GROWN)
        else:
            self._resume(checkpoint)

    @property
    def finished(self) -> bool:
        """All arms have their results."""
        return len(self.results) == len(self._names)

    @property
    def kept(self) -> Kept:
        """How much of the record belongs to it, before it goes on."""
        begun = not self.finished and self.arm.episode.decision
        # The record of the last decision travels with the next one's transfer.
        decisions = self.arm.episode.decision - 1 if begun else None
        return Kept(len(self.results), decisions, self._recorded_unix_s)

    @property
    def told(self) -> int:
        """Decisions that were told of, in all arms, before it goes on."""
        return len(self.results) * self.config.training.horizon + (self.kept.decisions or 0)

    def run(
        self, stopped: Callable[[], bool], folder: RunFolder, store: RunStore | None
    ) -> Iterator[tuple[str, DecisionLine, list[Event]]]:
        """Train the arms that are left until the last one ends or `stopped` says so, telling what happens in each.

        Parameters
        ----------
        stopped
            Asked before each decision.
        folder
            Gets the checkpoints, and the grown network as soon as it is finished, or stopped.
        store
            Where to record; None: nowhere.
        """
        checkpoints = Checkpoints(folder.path)
        if not self._number:
            self._save(checkpoints, store)
        saved = time.monotonic()
        while not self.finished:
            name = self._names[len(self.results)]
            if self.arm.name != name:
                self.arm = Arm(self.config, self.task, name)
            for line, events in self.arm.run(stopped, store):
                yield name, line, events
                if time.monotonic() - saved >= SAVE_EVERY_S:
                    self._save(checkpoints, store)
                    saved = time.monotonic()
            if name == GROWN:
                folder.model(self.arm.episode.population, ROW)
            if self.arm.episode.done:
                self.results.append(self.arm.result())
            self._save(checkpoints, store)
            if stopped():
                return

    def _save(self, checkpoints: Checkpoints, store: RunStore | None) -> None:
        """Keep where the run is; the record up to there is written before."""
        if store is not None:
            store.flush()
        facts: dict[str, Any] = {
            "kind": KIND,
            "results": [asdict(result) for result in self.results],
            "recorded_unix_s": time.time(),
        }
        files: dict[str, bytes] = {}
        if not self.finished and self.arm.name == self._names[len(self.results)] and self.arm.episode.decision:
            episode, files = episode_parts(self.arm.episode)
            facts |= {"arm": self.arm.name, "seconds": self.arm.seconds, "episode": episode}
        self._number += 1
        checkpoints.save(Checkpoint(self._number, facts, files))

    def _resume(self, checkpoint: Checkpoint) -> None:
        facts = checkpoint.facts
        if facts.get("kind") != KIND:
            raise ValueError(f"it is not of a grow run, but of kind {facts.get('kind')!r}")
        self.results = [ArmResult(**result) for result in facts["results"]]
        self._number, self._recorded_unix_s = checkpoint.number, facts["recorded_unix_s"]
        self.arm = Arm(self.config, self.task, self._names[min(len(self.results), len(self._names) - 1)])
        if "episode" in facts:
            self.arm.seconds = facts["seconds"]
            restore_episode(self.arm.episode, facts["episode"], checkpoint.files)
