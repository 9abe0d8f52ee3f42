"""Recording a run: what each round, decision and end of an episode puts into the run store.

Rows are made in the store's own thread; the run itself only queues them.

Shapes: R rows, S slots, B blueprints, O operators, K coalitions.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.kasmina.blueprints.registry import seed_cost
from esper.kasmina.gates import gate_errors, gate_limits
from esper.leyline.actions import Blueprint, Operator
from esper.leyline.checks import ALL_GATE_CHECKS
from esper.leyline.config import GateConfig, PopulationConfig, RunConfig, TrainConfig
from esper.leyline.panics import Panic
from esper.leyline.stages import BLENDED_STAGES, Stage, stage_table
from esper.nissa.machine import hardware, software
from esper.nissa.store import RunStore
from esper.nissa.writer import Change, Rows
from esper.simic.columns import (
    PANICS,
    Columns,
    decision_columns,
    failure_columns,
    merge,
    or_null,
    slot_columns,
    transition_columns,
)
from esper.simic.episode import Episode
from esper.simic.layers import LayerReport
from esper.simic.ppo import HeadReport, UpdateReport
from esper.simic.step import Step
from esper.simic.story import transitions_of

_BLENDED = stage_table(BLENDED_STAGES).numpy()


LEARNING, SEVERAL = "policy in training", "several"
"""Controller of a run that trains its own, and of one that compares."""


def run_columns(config: PopulationConfig, command: str, planned_decisions: int) -> Columns:
    """Columns of `run` that are known at the start."""
    return {
        "run_id": secrets.token_hex(8),
        "command": command,
        "task": config.task,
        "host": config.host,
        "controller": _who_decides(config),
        "seed": config.seed,
        "config": config.model_dump_json(),
        "level": config.recording.record,
        "planned_decisions": planned_decisions,
        **software(),
        **hardware(config.device),
    }


def _who_decides(config: PopulationConfig) -> str:
    if isinstance(config, RunConfig):
        return config.controller
    return LEARNING if isinstance(config, TrainConfig) else SEVERAL


class RoundRecorder:
    """Records one round: the episodes of one population.

    Parameters
    ----------
    store
        Where to.
    number
        Of the round.
    episode
        Its population.
    purpose, arm, controller
        See `round` in the schema.
    twin_round
        Round of the twins of its rows, where they have one of their own.
    goes_on
        The episode was restored, and the store has its round up to there.
    """

    def __init__(
        self,
        store: RunStore,
        number: int,
        episode: Episode,
        *,
        purpose: str,
        arm: str,
        controller: str,
        twin_round: int | None = None,
        goes_on: bool = False,
    ) -> None:
        self._store, self._number, self._episode = store, number, episode
        self._full = episode.config.recording.record == "full"
        self._step: Step | None = None
        self._timed = episode.decision if goes_on else 0
        self._waiting: deque[Step] = deque()
        population, training = episode.population, episode.config.training
        rows, host = population.rows, episode.task.host
        self._parameters, self._cost_SBO = host.body.parameter_count, _cost_table(episode)
        self._seed_parameters_SBO = population.lifecycle.parameter_counts.cpu().numpy()
        contexts = episode.contexts
        self._price_R = _as_given(contexts.price_R)
        # In a round of its own the twin of a row has the row's place; else it stands beside it.
        twin_R = np.arange(rows) if twin_round is not None else contexts.twin_R.cpu().numpy()
        has_twin_R = (twin_R != np.arange(rows)) | (twin_round is not None)
        self._episodes: Columns = {
            "round": number,
            "row": np.arange(rows),
            "row_id": population.init_id_R.cpu().numpy(),
            "twin_round": or_null(has_twin_R, np.full(rows, number if twin_round is None else twin_round)),
            "twin_row": or_null(has_twin_R, twin_R),
            "price_nats": self._price_R,
            "learning_rate": _as_given(contexts.rate_R),
            "label_noise_share": _as_given(contexts.noise_R),
            "host_parameters": self._parameters,
            "host_multiply_adds": host.cost(),
        }
        begin = {
            "round": [number],
            "purpose": purpose,
            "arm": arm,
            "controller": controller,
            "grows": int(controller != "never"),
            "rows": rows,
            "horizon_decisions": training.horizon,
            "updates_per_decision": training.updates_per_decision,
            "started_unix_s": time.time(),
            "decisions": 0,
        }
        round_begins: Rows | Change = Rows("round", begin)
        if goes_on:
            round_begins = Change("round", {"ended_unix_s": None}, {"round": number})
        running = Rows("episode", self._episodes | {"status": "running"}, replace=goes_on)
        store.add(1 + rows, lambda: [round_begins, running])

    def decision(self, step: Step) -> None:
        """Record a decision, and what the phases have taken since the last time."""
        self._step = step
        self._waiting.append(step)
        rows, slots = step.structure.stage.shape
        if not self._store.add(rows * (2 + slots), self._decision_writes):
            self._waiting.clear()
        made = self._episode.decision
        self._store.time(self._number, made - self._timed, self._episode.clock.take())
        self._timed = made

    def update(self, report: UpdateReport, seconds: float, rate: float) -> None:
        """Record the policy update after the round."""
        parts = ("heads", "layers")
        facts = {field.name: getattr(report, field.name) for field in fields(report) if field.name not in parts}
        facts |= {"stopped_early": int(report.stopped_early), "update_s": seconds, "policy_learning_rate": rate}
        heads = {"round": self._number, "head": list(report.heads)}
        heads |= {f.name: [getattr(head, f.name) for head in report.heads.values()] for f in fields(HeadReport)}
        layers = {"round": self._number, "position": list(range(len(report.layers))), "layer": list(report.layers)}
        layers |= {f.name: [getattr(layer, f.name) for layer in report.layers.values()] for f in fields(LayerReport)}
        changed = Change("round", facts, {"round": self._number})
        writes: list[Rows | Change] = [changed, Rows("head", heads), Rows("layer", layers)]
        self._store.add(1 + len(report.heads) + len(report.layers), lambda: writes)

    def coalitions(self, row: np.ndarray, enabled: np.ndarray, loss_K: Tensor, examples: int) -> None:
        """Record losses [K] of rows [K] with sets of their seeds [K, S]."""
        columns = {
            "round": self._number,
            "decision": self._step.decision if self._step else 0,
            "row": row,
            "coalition": enabled @ 2 ** np.arange(enabled.shape[1]),
            "loss_nats": loss_K.cpu().numpy().astype(float),
            "examples": examples,
        }
        self._store.add(len(row), lambda: [Rows("contribution", columns)])

    def end(self, status: str, results: Mapping[str, Any]) -> None:
        """Record how the episodes ended, and wait until it is written.

        Parameters
        ----------
        status, results
            Columns of `episode`, those of the end that the decisions do not tell. The status is that of the rows that
            are not over since a failure.
        """
        ended = time.time()
        governor = self._episode.governor
        told = torch.stack((governor.failure_R, governor.skipped_R, governor.restored_R))
        panic_R, skipped_R, restored_R = told.cpu().numpy()
        over = "given up" if governor.recovers else "rolled back"
        ends = {
            "status": np.where(panic_R != int(Panic.NONE), over, status).astype(object),
            "status_reason": PANICS[panic_R],
            "skipped_updates": skipped_R,
            "restorations": restored_R,
        }
        columns = self._episodes | ends | self._growth() | dict(results)
        writes: list[Rows | Change] = [
            Rows("episode", columns, replace=True),
            Change("round", {"ended_unix_s": ended}, {"round": self._number}),
        ]
        self._store.add(len(self._episodes["row"]), lambda: writes)
        self._store.flush()

    def _growth(self) -> Columns:
        """Columns of `episode` that the last decision tells."""
        step = self._step
        if step is None:
            return {"decisions": 0}
        slots = step.slots
        in_pass_RS = _BLENDED[slots["stage"]] & (slots["alpha"] > 0)
        cost_RS = self._cost_SBO[np.arange(in_pass_RS.shape[1]), slots["blueprint"], slots["operator"]]
        added_R = (slots["parameters"] * in_pass_RS).sum(1)
        return {
            "decisions": step.decision + 1,
            "added_parameters": added_R,
            "added_multiply_adds": (cost_RS * in_pass_RS).sum(1),
            "committed_seeds": (slots["stage"] == Stage.FOSSILIZED).sum(1),
            "rent_nats": self._price_R * np.log1p(added_R / self._parameters),
            "val_loss_nats": step.val_loss_R.astype(float),
            "val_accuracy": step.val_accuracy_R.astype(float),
        }

    def _decision_writes(self) -> list[Rows | Change]:
        """Make the rows of all decisions that wait, at once: a numpy call costs one decision what it costs ten."""
        steps = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not steps:
            return []
        first, last, merged = steps[0], steps[-1], merge(steps)
        rows = len(last.value_R)
        means = {
            "train_loss_nats": _mean(last.train_loss_R),
            "val_loss_nats": _mean(last.val_loss_R),
            "val_accuracy": _mean(last.val_accuracy_R),
        }
        writes: list[Rows | Change] = [
            Change("round", {"decisions": last.decision + 1, **means}, {"round": self._number}),
        ]
        if first.decision == 0:
            writes += _gate_checks(self._episode.config.growth.gates)
        tables = {
            "transition": transition_columns(transitions_of(merged), self._seed_parameters_SBO),
            "failure": failure_columns(merged),
        }
        if self._full:
            tables |= {"decision": decision_columns(merged), "slot": slot_columns(merged)}
        for table, columns in tables.items():
            number, row = np.divmod(columns["row"], rows)
            place = {"round": self._number, "decision": number + first.decision, "row": row}
            writes.append(Rows(table, columns | place))
        return writes


def _gate_checks(config: GateConfig) -> list[Change]:
    """Limits of the gates, and how many standard errors are added to them."""
    limits, errors = gate_limits(config), gate_errors(config)
    return [
        Change(
            "gate_check",
            {
                "limit_value": limits[check] if np.isfinite(limits[check]) else None,
                "standard_errors": errors.get(check),
            },
            {"position": at},
        )
        for at, check in enumerate(ALL_GATE_CHECKS)
    ]


def _as_given(values_R: Tensor) -> np.ndarray:
    """Float64 with the digits that were configured: 0.005, not the 0.004999999888 that float32 makes of it."""
    digits: np.ndarray = values_R.cpu().numpy().astype(str).astype(np.float64)
    return digits


def _mean(values: np.ndarray) -> float | None:
    """Mean of the finite values; None where there are none."""
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else None


def _cost_table(episode: Episode) -> np.ndarray:
    """Multiply-adds [S, B, O] of every seed that fits, 0 elsewhere."""
    fits_SB = episode.population.fits_SB.cpu().numpy()
    table = np.zeros((*fits_SB.shape, len(Operator)), dtype=np.int64)
    for slot, site in enumerate(episode.task.host.slot_config.sites):
        for blueprint in np.flatnonzero(fits_SB[slot]).tolist():
            for operator in Operator:
                table[slot, blueprint, operator] = seed_cost(Blueprint(blueprint), operator, site)
    return table
