"""The main job: grow one network, then train its two controls under the same conditions.

The arms share initialisation, data order and number of updates, and run one after the other so that each has its own
seconds: the grown network, the host alone, and the host with every slot filled from the start.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from esper.leyline.actions import Blueprint, Operator
from esper.leyline.config import RunConfig
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.leyline.stages import BLENDED_STAGES, OCCUPIED_STAGES, Stage, stage_table
from esper.nissa.store import RunStore
from esper.simic.contexts import Contexts
from esper.simic.episode import Episode
from esper.simic.recorder import RoundRecorder
from esper.simic.step import Step
from esper.simic.story import Event, events_of
from esper.tolaria.evaluation import coalition_losses, coalitions_of, evaluate
from esper.tolaria.tasks import Task

ROW = 0
"""A grow run is a population of one."""
_BLENDED = stage_table(BLENDED_STAGES).numpy()
ARMS: dict[str, tuple[str | None, bool]] = {
    "grown": (None, False),
    "host alone": ("never", False),
    "everything from the start": ("never", True),
}
"""Name of each arm: its controller (None: the run's own), and whether every slot is filled before the start.

The place of an arm is the number of its round in the run store.
"""
GROWN, TWIN = "grown", "host alone"
"""The arm that matters, and the one that every other is compared with."""


@dataclass(frozen=True)
class SlotLine:
    """One slot after a decision; None where not measured."""

    slot: str
    stage: str
    blueprint: str | None
    operator: str | None
    alpha: float
    parameters: int
    contribution: float | None
    contribution_se: float | None
    incubator_gain: float | None
    incubator_gain_se: float | None
    gradient_ratio: float | None


@dataclass(frozen=True)
class DecisionLine:
    """The run after a decision: losses in nats, accuracy as a fraction, times in seconds.

    Attributes
    ----------
    failure
        Why the host was returned to its last good state after the decision, and how it goes on; None: it was not.
    """

    decision: int
    updates: int
    seconds: float
    train_loss: float | None
    val_loss: float | None
    val_accuracy: float | None
    parameters: int
    failure: str | None
    slots: tuple[SlotLine, ...]


@dataclass(frozen=True)
class ArmResult:
    """One arm on the test split.

    Attributes
    ----------
    skipped_updates
        Updates that the host skipped, because its gradient was not finite.
    restorations
        How often the host went on from its last good state after it had failed.
    given_up
        Why it was given up after too many of them, its last good state being the result; None: it was not.
    """

    arm: str
    test_accuracy: float
    test_loss: float | None
    parameters: int
    seconds: float
    decisions: int
    skipped_updates: int
    restorations: int
    given_up: str | None


class Arm:
    """One arm of a grow run.

    Parameters
    ----------
    config, task
        The run.
    name
        Key of `ARMS`.
    """

    def __init__(self, config: RunConfig, task: Task, name: str) -> None:
        self.config, self.task, self.name = config, task, name
        own, static = ARMS[name]
        self._controller = own or config.controller
        ids = torch.zeros(1, dtype=torch.int64)
        contexts = Contexts.alone(config, ids.to(config.device), config.price)
        self.episode = Episode(config, task, self._controller, ids, static=static, contexts=contexts, recovers=True)
        self.seconds = 0.0
        self._recorder: RoundRecorder | None = None

    def run(
        self, stopped: Callable[[], bool], store: RunStore | None = None
    ) -> Iterator[tuple[DecisionLine, list[Event]]]:
        """Make decisions until the episode ends or `stopped` says so, giving what happened in each.

        A decision is told when the next one is made: its record travels with that one's transfer.

        Parameters
        ----------
        stopped
            Asked before each decision.
        store
            Where to record it all; None: nowhere.
        """
        if store is not None:
            number = {arm: at for at, arm in enumerate(ARMS)}
            self._recorder = RoundRecorder(
                store,
                number[self.name],
                self.episode,
                purpose="grow" if self.name == GROWN else "control",
                arm=self.name,
                controller=self._controller,
                twin_round=None if self.name == TWIN else number[TWIN],
                goes_on=self.episode.decision > 0,
            )

        while not self.episode.done and not stopped():
            start, before = time.perf_counter(), self.seconds
            step = self.episode.advance(record=True)
            self.seconds += time.perf_counter() - start
            if step is not None:
                yield self._told(step, before)
        if self.episode.decision:
            yield self._told(self.episode.step(), self.seconds)
        if not self.episode.done and self._recorder is not None:
            self._recorder.end("interrupted", {"training_s": self.seconds})

    def _told(self, step: Step, seconds: float) -> tuple[DecisionLine, list[Event]]:
        if self._recorder is not None:
            self._recorder.decision(step)
        return self._line(step, seconds), self._events(step)

    def _events(self, step: Step) -> list[Event]:
        return events_of(step, ROW, self.task.host.slot_config)

    @property
    def parameters(self) -> int:
        """Learned numbers of the network in the forward pass, those of its seeds included."""
        population = self.episode.population
        added = population.slots.parameters[ROW][torch.from_numpy(population.base[ROW])].sum()
        return self._host_parameters + int(added)

    @property
    def _host_parameters(self) -> int:
        return self.episode.population.hosts.layer.parameter_count

    def result(self) -> ArmResult:
        """Evaluate on the test split: once, at the end."""
        test = evaluate(self.episode.population, self.task.data.test)
        loss, accuracy = float(test.loss_R[ROW]), float(test.accuracy_R[ROW])
        if self._recorder is not None:
            self._record_coalitions(self._recorder)
            results = {"training_s": self.seconds, "test_loss_nats": loss, "test_accuracy": accuracy}
            self._recorder.end("finished", results)
        governor = self.episode.governor
        return ArmResult(
            arm=self.name,
            test_accuracy=accuracy,
            test_loss=_number(loss),
            parameters=self.parameters,
            seconds=self.seconds,
            decisions=self.episode.decision,
            skipped_updates=int(governor.skipped_R[ROW]),
            restorations=int(governor.restored_R[ROW]),
            given_up=PANIC_TEXT.get(Panic(int(governor.failure_R[ROW]))),
        )

    def _record_coalitions(self, recorder: RoundRecorder) -> None:
        """What sets of the seeds are worth together: which of them need each other, which do the same."""
        population, split = self.episode.population, self.task.data.reward_validation
        enabled = coalitions_of(population.base[ROW])
        row = np.full(len(enabled), ROW)
        recorder.coalitions(row, enabled, coalition_losses(population, split, row, enabled), len(split.counted.y))

    def _line(self, step: Step, seconds: float) -> DecisionLine:
        stage_S = step.slots["stage"][ROW]
        blended_S = _BLENDED[stage_S] & (step.slots["alpha"][ROW] > 0)
        return DecisionLine(
            decision=step.decision,
            updates=(step.decision + 1) * self.config.training.updates_per_decision,
            seconds=seconds,
            train_loss=_number(float(step.train_loss_R[ROW])),
            val_loss=_number(float(step.val_loss_R[ROW])),
            val_accuracy=_number(float(step.val_accuracy_R[ROW])),
            parameters=self._host_parameters + int(step.slots["parameters"][ROW][blended_S].sum()),
            failure=_failure(step),
            slots=tuple(
                _slot_line(step, number, slot) for number, slot in enumerate(self.task.host.slot_config.slot_ids)
            ),
        )


def _failure(step: Step) -> str | None:
    """In words why the host failed in the decision, and how it goes on; None: it did not fail."""
    panic = Panic(int(step.panic_R[ROW]))
    if panic is Panic.NONE:
        return None
    share = float(step.rate_share_R[ROW])
    goes_on = "given up" if step.over_R[ROW] else f"restored, its learning rate multiplied by {share:.3g}"
    return f"{goes_on}: {PANIC_TEXT[panic]}"


def _slot_line(step: Step, number: int, slot: str) -> SlotLine:
    values = {name: array[ROW, number].item() for name, array in step.slots.items()}
    stage = Stage(values["stage"])
    occupied = stage in OCCUPIED_STAGES
    measured = ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se", "gradient_ratio")
    return SlotLine(
        slot=slot,
        stage=stage.name,
        blueprint=Blueprint(values["blueprint"]).name.lower() if occupied else None,
        operator=Operator(values["operator"]).name.lower() if occupied else None,
        alpha=values["alpha"],
        parameters=values["parameters"],
        **{name: _number(values[name]) for name in measured},
    )


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
