"""The story of one row: what was done to its slots, by whom, and why."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

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
from esper.leyline.sites import SlotConfig
from esper.leyline.stages import ADVANCE_TARGET, FOSSILIZABLE_STAGES, STEP_TABLE, WAITING_STAGES, Stage
from esper.simic.episode import Step

_OPS = frozenset(Op)


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
        "controller" for an action, "clock" for a transition that only time makes.
    what
        The operation, or "clock".
    detail
        The choices of the heads that the operation uses.
    refused_by
        The check that refused it, None where it was accepted.
    checks
        Every check of the gate that was asked, or, for a cull, of the gate that the seed stood before.
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON line."""
        return asdict(self)

    @property
    def reason(self) -> str:
        """The checks in words, the decisive one first."""
        if self.refused_by is not None and not self.checks:
            return CHECK_TEXT[Check[self.refused_by]]
        ordered = sorted(self.checks, key=lambda c: c.name != self.refused_by)
        return "; ".join(_in_words(c) for c in ordered)


def events_of(step: Step, row: int, slots: SlotConfig) -> list[Event]:
    """What happened to one row in one decision, in order: the action first, then the clock."""
    events = []
    stages = step.stage_before_RS[row].copy()
    op, slot = (int(step.action_RH[row, head]) for head in (Head.OP, Head.SLOT))
    if op != Op.WAIT:
        events.append(_action_event(step, row, op, slot, slots))
        if 0 <= slot < slots.slots:
            stages[slot] = step.after_R[row]
    for number, slot_id in enumerate(slots.slot_ids):
        now = Stage(int(step.slots["stage"][row, number]))
        then = Stage(int(stages[number]))
        while then is not now:
            # A seed that faded out is culled by the clock; waiting stages have one way on.
            following = STEP_TABLE[then] if then in WAITING_STAGES else Stage.CULLED
            events.append(_clock_event(step.decision, slot_id, then, following))
            then = following
    return events


def _action_event(step: Step, row: int, op: int, slot: int, slots: SlotConfig) -> Event:
    refused = Check(int(step.refused_by_R[row]))
    accepted = bool(step.accepted_R[row])
    named = 0 <= slot < slots.slots
    return Event(
        decision=step.decision,
        slot=slots.slot_ids[slot] if named else f"slot {slot}",
        actor="controller",
        what=Op(op).name.lower() if op in _OPS else f"operation {op}",
        before=Stage(int(step.before_R[row])).name,
        after=Stage(int(step.after_R[row])).name,
        accepted=accepted,
        refused_by=None if accepted else refused.name,
        detail=_choices(step, row, Op(op)) if op in _OPS else {},
        checks=_gate_checks(step, row, op, slot) if named and _gate_was_asked(refused) else (),
    )


def _clock_event(decision: int, slot: str, before: Stage, after: Stage) -> Event:
    return Event(decision, slot, "clock", "clock", before.name, after.name, True, None, {}, ())


def _gate_was_asked(refused: Check) -> bool:
    return refused is Check.NONE or refused in ALL_GATE_CHECKS


def _gate_checks(step: Step, row: int, op: int, slot: int) -> tuple[CheckResult, ...]:
    before = Stage(int(step.before_R[row]))
    # A cull asks no gate; the gate that the seed stood before says what it lacked.
    target = Stage.FOSSILIZED if before in FOSSILIZABLE_STAGES else ADVANCE_TARGET.get(before)
    if op not in (Op.ADVANCE, Op.FOSSILIZE, Op.CULL) or target is None:
        return ()
    results = []
    for check in GATE_CHECKS[GATE_OF_STAGE[target]]:
        at = ALL_GATE_CHECKS.index(check)
        value, limit = float(step.value_CRS[at, row, slot]), float(step.limit_C[at])
        passed = bool(step.passed_CRS[at, row, slot])
        results.append(CheckResult(check.name, _number(value), _number(limit), passed))
    return tuple(results)


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
    limit = "" if check.limit is None else f" (limit {check.limit:g})"
    return f"{CHECK_TEXT[Check[check.name]]} {value}{limit} {'passed' if check.passed else 'refused'}"
