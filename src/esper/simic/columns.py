"""From decisions to columns of the run store: whole tables at once, no loop over rows.

Shapes: R rows, S slots, H heads, O operations or operators, B blueprints, C gate checks, N transitions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
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
    Operator,
    Style,
)
from esper.leyline.checks import ALL_GATE_CHECKS, CHECK_TEXT, WORTH_CHECKS, Check, Gate
from esper.leyline.panics import PANIC_TEXT, Panic
from esper.leyline.slots import Structure
from esper.leyline.stages import OCCUPIED_STAGES, STAGE_COUNT, Stage, stage_table
from esper.nissa.schema import QUANTITIES
from esper.simic.step import Step
from esper.simic.story import END, HARVEST, HARVESTED, ROLLBACK, Transitions

Columns = dict[str, Any]
NULL = math.nan
"""What becomes NULL, in columns of text too: sqlite3 sends None through its adapters, at several times the cost."""


def _names(members: Mapping[int, str], count: int) -> np.ndarray:
    """Object array: name of each value, NULL where there is none."""
    return np.array([members.get(value, NULL) for value in range(count)], dtype=object)


_OPS = _names({op: op.name.lower() for op in Op}, len(Op))
_STAGES = _names({stage: stage.name for stage in Stage}, STAGE_COUNT)
_CHECKS = _names({check: check.name for check in Check if check is not Check.NONE}, len(Check))
_GATES = _names({gate: gate.name for gate in Gate}, max(Gate) + 1)
_BLUEPRINTS = _names({b: b.name.lower() for b in Blueprint if b is not Blueprint.NOOP}, len(Blueprint))
_OPERATORS = _names({o: o.name.lower() for o in Operator}, len(Operator))
_CHOICES: dict[Head, tuple[str, np.ndarray]] = {
    Head.BLUEPRINT: ("blueprint", _names({b: b.name.lower() for b in Blueprint}, len(Blueprint))),
    Head.STYLE: ("style", _names({s: s.name.lower() for s in Style}, len(Style))),
    Head.TEMPO: ("tempo_decisions", np.array(TEMPOS, dtype=object)),
    Head.ALPHA_TARGET: ("alpha_target", np.array(ALPHA_TARGETS, dtype=object)),
    Head.ALPHA_SPEED: ("alpha_speed_decisions", np.array(ALPHA_SPEEDS, dtype=object)),
    Head.ALPHA_CURVE: ("alpha_curve", _names({c: c.name.lower() for c in Curve}, len(Curve))),
}
"""Column of each choice behind operation and slot, and what its values stand for."""
_USED_OH = np.array([[head in HEADS_OF_OP[op] for head in Head] for op in Op])
_OP_BITS = 2 ** np.arange(len(Op))
_OCCUPIED = stage_table(OCCUPIED_STAGES).numpy()
_REASONS = _names(
    {check: CHECK_TEXT[check] for check in Check if check not in (Check.NONE, *ALL_GATE_CHECKS)}, len(Check)
)
_CHECK_BITS = 2 ** np.arange(len(ALL_GATE_CHECKS))
_FAILURES = np.array(
    [
        ",".join(check.name for check, bit in zip(ALL_GATE_CHECKS, _CHECK_BITS.tolist(), strict=True) if code & bit)
        or NULL
        for code in range(2 ** len(ALL_GATE_CHECKS))
    ],
    dtype=object,
)
"""Names of the checks whose bits are set."""
_CLOCK_REASONS = _names(
    {
        Stage.BLENDING: "it faded out",
        Stage.CULLED: "its seed is gone",
        Stage.EMBARGOED: "its rest is over",
        Stage.RESETTING: "it is free again",
    },
    STAGE_COUNT,
)
"""Why the clock moved a slot on, by the stage that it left."""
PANICS = _names({panic: PANIC_TEXT[panic] for panic in PANIC_TEXT}, len(Panic))
"""Why a row failed, by the value of `Panic`; NULL for NONE."""


def merge(steps: Sequence[Step]) -> Step:
    """Lay decisions behind one another, as if each row of each were a row of one decision."""
    first = steps[0]

    def joined(parts: Sequence[np.ndarray], axis: int = 0) -> np.ndarray:
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)

    arrays: dict[str, Any] = {
        field.name: joined([getattr(step, field.name) for step in steps], int(field.name.endswith("_CRS")))
        for field in fields(Step)
        if field.name not in ("decision", "structure", "acted", "slots", "reward")
    }

    def laid(structures: Sequence[Structure]) -> Structure:
        return Structure(**{f.name: joined([getattr(one, f.name) for one in structures]) for f in fields(Structure)})

    structure, acted = laid([step.structure for step in steps]), laid([step.acted for step in steps])
    slots = {name: joined([step.slots[name] for step in steps]) for name in first.slots}
    reward = {name: joined([step.reward[name] for step in steps]) for name in first.reward}
    return replace(first, structure=structure, acted=acted, slots=slots, reward=reward, **arrays)


def decision_columns(step: Step) -> Columns:
    """Columns of `decision`, one row for each host."""
    op_R = step.action_RH[:, Head.OP]
    known_R = (op_R >= 0) & (op_R < len(Op))
    used_RH = _USED_OH[np.where(known_R, op_R, int(Op.WAIT))]
    p_RH = np.where(used_RH, np.exp(step.log_prob_RH.astype(float)).clip(max=1.0), np.nan)
    choices = {
        name: _look_up(table, step.action_RH[:, head], used_RH[:, head]) for head, (name, table) in _CHOICES.items()
    }
    return {
        "row": np.arange(len(op_R)),
        "legal_ops": step.legal_RO @ _OP_BITS,
        "op": _op_names(op_R),
        "slot": or_null(used_RH[:, Head.SLOT], step.action_RH[:, Head.SLOT]),
        **choices,
        **{f"p_{head.name.lower()}": p_RH[:, head] for head in Head},
        "accepted": step.accepted_R.astype(int),
        "refused_by": _CHECKS[step.refused_by_R],
        "value": step.value_R.astype(float),
        **reward_columns(step),
        "train_loss_nats": step.train_loss_R.astype(float),
        "val_loss_nats": step.val_loss_R.astype(float),
        "val_accuracy": step.val_accuracy_R.astype(float),
        "skipped_updates": step.skipped_R,
    }


def failure_columns(step: Step) -> Columns:
    """Columns of `failure`, one row for each host that failed."""
    row = np.flatnonzero(step.panic_R != Panic.NONE)
    over = step.over_R[row]
    return {
        "row": row,
        "reason": PANICS[step.panic_R[row]],
        "culled_seeds": step.culled_RS[row].sum(1),
        "restored": (~over).astype(int),
        "learning_rate_share": or_null(~over, step.rate_share_R[row].astype(float)),
        "unix_s": time.time(),
    }


def reward_columns(step: Step) -> Columns:
    """Columns of `decision` about the reward: its parts, and their sum."""
    parts = {f"reward_{name}": part_R.astype(float) for name, part_R in step.reward.items()}
    return {**parts, "reward": np.sum(list(parts.values()), axis=0)} if parts else {}


def slot_columns(step: Step) -> Columns:
    """Columns of `slot`, one row for each seed."""
    row, slot = np.nonzero(_OCCUPIED[step.slots["stage"]])
    of = {name: array[row, slot] for name, array in step.slots.items()}
    reals = ("alpha", "gradient_ratio")
    measured = ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se")
    return {
        "row": row,
        "slot": slot,
        "seed": of["seed_id"],
        "stage": _STAGES[of["stage"]],
        "blueprint": _BLUEPRINTS[of["blueprint"]],
        "parameters": of["parameters"],
        # Every contribution is measured after every decision.
        "contribution_age_decisions": or_null(~np.isnan(of["contribution"]), np.zeros_like(row)),
        **{name: of[name].astype(float) for name in reals},
        **{f"{name}_nats": of[name].astype(float) for name in measured},
    }


def transition_columns(told: Transitions, parameters_SBO: np.ndarray) -> Columns:
    """Columns of `transition`; `parameters_SBO` counts those of each blueprint and operator in each slot."""
    seed, governor = told.seed >= 0, told.panic != Panic.NONE
    actor = np.select([told.by_clock, governor, told.harvested], ["clock", "governor", END], "controller")
    reason = np.where(told.by_clock, _CLOCK_REASONS[told.before], _REASONS[told.refused_by])
    of_seed = np.where(seed, told.slot, 0), told.blueprint, told.operator
    quantities: dict[str, np.ndarray] = {}
    for at, check in enumerate(ALL_GATE_CHECKS):
        before = quantities.get(QUANTITIES[check], np.nan)
        value_N = told.value_NC[:, at].astype(float)
        quantities[QUANTITIES[check]] = np.where(np.isnan(value_N), before, value_N)
    return {
        "row": told.row,
        "step": told.order,
        "slot": told.slot,
        "seed": or_null(seed, told.seed),
        "blueprint": or_null(seed, _BLUEPRINTS[told.blueprint]),
        "operator": or_null(seed, _OPERATORS[told.operator]),
        "parameters": or_null(seed, parameters_SBO[of_seed]),
        "actor": actor.astype(object),
        "op": np.select([told.by_clock, governor, told.harvested], ["clock", ROLLBACK, HARVEST], _op_names(told.op)),
        "before": _STAGES[told.before],
        "after": _STAGES[told.after],
        "allowed": told.accepted.astype(int),
        "gate": _GATES[told.gate],
        "refused_by": _CHECKS[told.refused_by],
        "failed_checks": _failed(told.passed_NC),
        "reason": np.select([governor, told.harvested], [PANICS[told.panic], HARVESTED], reason),
        "limit_nats": _worth_limit(told),
        **quantities,
    }


def _failed(passed_NC: np.ndarray) -> np.ndarray:
    """Names of the checks that failed, joined by commas."""
    named: np.ndarray = _FAILURES[~passed_NC @ _CHECK_BITS]
    return named


def _worth_limit(told: Transitions) -> np.ndarray:
    """What a measured worth had to be above (nats), NaN where none was asked for: a gate asks for at most one."""
    at = [ALL_GATE_CHECKS.index(check) for check in WORTH_CHECKS]
    first_N, second_N = told.limit_NC[:, at].astype(float).T
    limit_N: np.ndarray = np.where(np.isnan(first_N), second_N, first_N)
    return limit_N


def _look_up(table: np.ndarray, index: np.ndarray, used: np.ndarray) -> np.ndarray:
    """What choices stand for; NULL where the head does not apply or the choice does not exist."""
    exists = used & (index >= 0) & (index < len(table))
    return or_null(exists, table[np.where(exists, index, 0)])


def or_null(there: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Keep the values that are there; NULL elsewhere."""
    kept = np.full(there.shape, NULL, dtype=object)
    kept[there] = values[there]
    return kept


def _op_names(op: np.ndarray) -> np.ndarray:
    known = (op >= 0) & (op < len(Op))
    names: np.ndarray = _OPS[np.where(known, op, 0)]
    for at in np.flatnonzero(~known).tolist():
        names[at] = f"operation {op[at]}"
    return names
