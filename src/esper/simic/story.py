"""The story of a run: what was done to the slots, by whom, and why.

Shapes: R rows, N transitions, C gate checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    HEADS_OF_OP,
    TEMPOS,
    Blueprint,
    Curve,
    Head,
    Op,
    Style,
)
from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, GATE_CHECKS, GATE_OF_STAGE, Check
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.leyline.sites import SlotConfig
from esper.leyline.stages import (
    ADVANCE_TARGET,
    FOSSILIZABLE_STAGES,
    STAGE_COUNT,
    STEP_TABLE,
    WAITING_STAGES,
    Stage,
)
from esper.simic.step import Step

ROLLBACK, HARVEST = "rollback", "harvest"
"""What the governor does, and the end of an episode, where a controller would name an operation."""
END = "end of episode"
"""Who culls what is not committed at the horizon."""
HARVESTED = "the episode is over and the seed was not committed"
"""Why."""
_OPS = frozenset(Op)
_JUDGED_OPS = [int(op) for op in (Op.ADVANCE, Op.FOSSILIZE, Op.CULL)]
_MOST_CLOCK_STEPS = len(WAITING_STAGES) + 1
_GATE_OF_CHECK = np.array([int(gate) for gate, checks in GATE_CHECKS.items() for _ in checks])
_IS_GATE_CHECK = np.array([check is Check.NONE or check in ALL_GATE_CHECKS for check in Check])


def _by_stage(values: Mapping[int, int], other: int) -> np.ndarray:
    """Lookup table over the values of `Stage`."""
    return np.array([values.get(stage, other) for stage in range(STAGE_COUNT)])


# Waiting stages have one way on; any other stage that the clock ends is that of a seed that faded out.
_AFTER_CLOCK = _by_stage({s: int(STEP_TABLE[s]) for s in WAITING_STAGES}, int(Stage.CULLED))
_GATE_BEFORE = _by_stage(
    {
        s: int(GATE_OF_STAGE[t])
        for s, t in (*ADVANCE_TARGET.items(), *((s, Stage.FOSSILIZED) for s in FOSSILIZABLE_STAGES))
    },
    0,
)
"""The gate that a seed in a stage stands before, 0 for none: a cull asks none, this one says what the seed lacked."""


@dataclass(frozen=True)
class CheckResult:
    """One check of a gate: its value and limit, None where not measured."""

    name: str
    value: float | None
    limit: float | None
    passed: bool


@dataclass(frozen=True)
class Event:
    """Something that happened to one slot.

    Attributes
    ----------
    actor
        "controller" for an action, "clock" for a transition that only time makes, "governor" for a rollback, "end of
        episode" for the harvest.
    what
        The operation, or "clock", or "rollback", or "harvest".
    detail
        The choices of the heads that the operation uses.
    refused_by
        The check that refused it, None where it was accepted.
    checks
        Every check of the gate that was asked, or, for a cull, of the gate that the seed stood before.
    panic
        Why the host was rolled back, where it was.
    harvested
        The seed was culled because the episode was over.
    """

    decision: int
    slot: str
    actor: str
    what: str
    before: str
    after: str
    accepted: bool
    refused_by: str | None
    detail: dict[str, Any]
    checks: tuple[CheckResult, ...]
    panic: Panic
    harvested: bool

    @property
    def reason(self) -> str:
        """The checks in words, the decisive one first; or why nobody had to ask."""
        if self.panic is not Panic.NONE:
            return PANIC_TEXT[self.panic]
        if self.harvested:
            return HARVESTED
        if self.refused_by is not None and not self.checks:
            return CHECK_TEXT[Check[self.refused_by]]
        ordered = sorted(self.checks, key=lambda c: c.name != self.refused_by)
        return "; ".join(_in_words(c) for c in ordered)


@dataclass(frozen=True)
class Transitions:
    """Every transition of one decision, by row, each row's in order.

    Attributes
    ----------
    row, slot
        Whose; the slot as it was named.
    order
        Within the row: 0 is the action, the clock follows, then the governor, then the end of the episode.
    seed, blueprint, operator
        Of the seed, before the decision or, where it germinated, after it; seed -1 where there is none.
    by_clock
        Time made it; nobody asked.
    panic
        Value of `Panic`: why the governor culled the seed, NONE where it did not.
    harvested
        The end of the episode culled the seed.
    op
        What was asked for, WAIT where nobody asked.
    before, after, accepted, refused_by
        Stages, and what came of it (values of `Stage` and `Check`).
    gate
        Value of `Gate`: the one that was asked or, for a cull, that the seed stood before; 0 for none.
    value_NC, passed_NC
        What that gate's checks saw, in the order of `ALL_GATE_CHECKS`; NaN, and passed, for the checks of others.
    """

    row: np.ndarray
    order: np.ndarray
    slot: np.ndarray
    seed: np.ndarray
    blueprint: np.ndarray
    operator: np.ndarray
    by_clock: np.ndarray
    panic: np.ndarray
    harvested: np.ndarray
    op: np.ndarray
    before: np.ndarray
    after: np.ndarray
    accepted: np.ndarray
    refused_by: np.ndarray
    gate: np.ndarray
    value_NC: np.ndarray
    limit_NC: np.ndarray
    passed_NC: np.ndarray


def transitions_of(step: Step) -> Transitions:
    """What happened in one decision: each row's action first, then the clock, the governor, the end of the episode."""
    op_R, named_R = step.action_RH[:, Head.OP], step.action_RH[:, Head.SLOT]
    stages = step.structure.stage.copy()
    acted = np.flatnonzero(op_R != Op.WAIT)
    exists_R = (named_R >= 0) & (named_R < stages.shape[1])
    there = acted[exists_R[acted]]
    stages[there, named_R[there]] = step.after_R[there]
    moves = [(acted, named_R[acted], step.before_R[acted], step.after_R[acted])]
    for _ in range(_MOST_CLOCK_STEPS):
        row, slot = np.nonzero(stages != step.slots["stage"])
        before = stages[row, slot]
        stages[row, slot] = _AFTER_CLOCK[before]
        moves.append((row, slot, before, stages[row, slot]))
    every = np.concatenate([np.stack(move) for move in moves], 1)
    unasked = np.arange(every.shape[1]) >= len(acted)
    culled, harvested = np.zeros_like(unasked), np.zeros_like(unasked)
    for mask, mask_RS in ((culled, step.culled_RS), (harvested, step.harvested_RS)):
        mask[unasked] = mask_RS[every[0, unasked], every[1, unasked]]
    # Stable: what the clock does to one slot stays in order.
    sorting = np.lexsort((every[1] * unasked, harvested, culled, unasked, every[0]))
    row, slot, before, after = every[:, sorting]
    unasked, culled, harvested = unasked[sorting], culled[sorting], harvested[sorting]
    first_of_row = np.searchsorted(row, row)
    acts_R = op_R != Op.WAIT
    op = np.where(unasked, int(Op.WAIT), op_R[row])
    refused_by = np.where(unasked, int(Check.NONE), step.refused_by_R[row])
    exists = exists_R[row] | unasked
    at = row, np.where(exists, slot, 0)
    gate = np.where(exists & np.isin(op, _JUDGED_OPS) & _IS_GATE_CHECK[refused_by], _GATE_BEFORE[before], 0)
    theirs_NC = gate[:, None] == _GATE_OF_CHECK
    germinated = step.structure.seed_id[at] < 0
    seed, blueprint, operator = (
        np.where(germinated, getattr(step.acted, name)[at], getattr(step.structure, name)[at])
        for name in ("seed_id", "blueprint", "operator")
    )
    return Transitions(
        row=row,
        order=np.arange(len(row)) - first_of_row + ~acts_R[row],
        slot=slot,
        seed=np.where(exists, seed, -1),
        blueprint=blueprint,
        operator=operator,
        by_clock=unasked & ~culled & ~harvested,
        panic=np.where(culled, step.panic_R[row], int(Panic.NONE)),
        harvested=harvested,
        op=op,
        before=before,
        after=after,
        accepted=unasked | step.accepted_R[row],
        refused_by=refused_by,
        gate=gate,
        value_NC=np.where(theirs_NC, step.value_CRS[:, at[0], at[1]].T, np.nan),
        limit_NC=np.where(theirs_NC, step.limit_CRS[:, at[0], at[1]].T, np.nan),
        passed_NC=step.passed_CRS[:, at[0], at[1]].T | ~theirs_NC,
    )


def events_of(step: Step, row: int, slots: SlotConfig) -> list[Event]:
    """What happened to one row in one decision, in the order of `transitions_of`."""
    told = transitions_of(step)
    return [_event(told, step, number, slots) for number in np.flatnonzero(told.row == row).tolist()]


def _event(told: Transitions, step: Step, number: int, slots: SlotConfig) -> Event:
    row, slot, op = (int(column[number]) for column in (told.row, told.slot, told.op))
    accepted, refused = bool(told.accepted[number]), Check(int(told.refused_by[number]))
    panic, harvested = Panic(int(told.panic[number])), bool(told.harvested[number])
    known = op in _OPS
    if told.by_clock[number]:
        actor, what = "clock", "clock"
    elif panic is not Panic.NONE:
        actor, what = "governor", ROLLBACK
    elif harvested:
        actor, what = END, HARVEST
    else:
        actor, what = "controller", Op(op).name.lower() if known else f"operation {op}"
    return Event(
        decision=step.decision,
        slot=slots.slot_ids[slot] if 0 <= slot < slots.slots else f"slot {slot}",
        actor=actor,
        what=what,
        before=Stage(int(told.before[number])).name,
        after=Stage(int(told.after[number])).name,
        accepted=accepted,
        refused_by=None if accepted else refused.name,
        detail=_choices(step, row, Op(op)) if known else {},
        checks=tuple(_check_result(told, number, at) for at in _checks_of(int(told.gate[number]))),
        panic=panic,
        harvested=harvested,
    )


def _checks_of(gate: int) -> list[int]:
    return np.flatnonzero(gate == _GATE_OF_CHECK).tolist()


def _check_result(told: Transitions, number: int, at: int) -> CheckResult:
    value, limit = float(told.value_NC[number, at]), float(told.limit_NC[number, at])
    return CheckResult(ALL_GATE_CHECKS[at].name, _number(value), _number(limit), bool(told.passed_NC[number, at]))


def _choices(step: Step, row: int, op: Op) -> dict[str, Any]:
    """Heads that the operation uses, as the values that they stand for."""
    meaning: dict[Head, Any] = {
        Head.BLUEPRINT: [b.name.lower() for b in Blueprint],
        Head.STYLE: [s.name.lower() for s in Style],
        Head.TEMPO: TEMPOS,
        Head.ALPHA_TARGET: ALPHA_TARGETS,
        Head.ALPHA_SPEED: ALPHA_SPEEDS,
        Head.ALPHA_CURVE: [c.name.lower() for c in Curve],
    }
    used = [head for head in meaning if head in HEADS_OF_OP[op]]
    chosen = {head: int(step.action_RH[row, head]) for head in used}
    return {head.name.lower(): meaning[head][i] for head, i in chosen.items() if 0 <= i < len(meaning[head])}


def _number(value: float) -> float | None:
    """Finite numbers only: JSON knows no others, and an unmeasured value is not a number."""
    return value if math.isfinite(value) else None


def _in_words(check: CheckResult) -> str:
    value = "not measured" if check.value is None else f"{check.value:.4g}"
    limit = "" if check.limit is None else f" (limit {check.limit:.4g})"
    return f"{CHECK_TEXT[Check[check.name]]} {value}{limit} {'passed' if check.passed else 'refused'}"
