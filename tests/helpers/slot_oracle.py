"""A plain, slow model of the slots: one dictionary for each slot, one action and one clock tick at a time.

Written from the rules of the lifecycle, not from the tensors: what it says of a slot must be what `Lifecycle` does.
"""

import math
from collections.abc import Callable

from esper.kasmina.alpha import SIGMOID_STEEPNESS
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
    head_sizes,
)
from esper.leyline.checks import Check
from esper.leyline.config import GateConfig
from esper.leyline.slots import AlphaMode
from esper.leyline.stages import Stage

NAN = math.nan
MEASURED = (
    *("contribution", "contribution_se", "incubator_gain", "incubator_gain_se"),
    *("gradient_norm", "gradient_ratio"),
)
GRADUAL = "gradual cull"
"""Stands for a CULL with a speed above 0."""

_STYLES = {
    Style.LINEAR_ADD: (Operator.ADD, Curve.LINEAR),
    Style.LINEAR_MULTIPLY: (Operator.MULTIPLY, Curve.LINEAR),
    Style.SIGMOID_ADD: (Operator.ADD, Curve.SIGMOID_STANDARD),
    Style.GATED_GATE: (Operator.GATE, Curve.LINEAR),
}


def empty_slot() -> dict[str, float]:
    """What is written in a slot without a seed."""
    return {
        "stage": Stage.DORMANT,
        "blueprint": Blueprint.NOOP,
        "operator": Operator.ADD,
        "curve": Curve.LINEAR,
        "alpha_mode": AlphaMode.HOLD,
        "ramp_done": 0,
        "ramp_total": 0,
        "age": 0,
        "stage_age": 0,
        "cooldown": 0,
        "seed_id": -1,
        "parameters": 0,
        "alpha": 0.0,
        "alpha_start": 0.0,
        "alpha_target": 0.0,
        **dict.fromkeys(MEASURED, NAN),
    }


def curve_height(curve: int, done: int, total: int) -> float:
    """Where a curve that rises from 0 to 1 stands after `done` of `total` steps."""
    p = done / total
    if curve == Curve.LINEAR:
        return p
    if curve == Curve.COSINE:
        return (1 - math.cos(math.pi * p)) / 2
    steepness = SIGMOID_STEEPNESS[Curve(curve)]

    def logistic(x: float) -> float:
        return 1 / (1 + math.exp(-steepness * (x - 0.5)))

    return (logistic(p) - logistic(0)) / (logistic(1) - logistic(0))


def fading(slot: dict[str, float]) -> bool:
    return slot["stage"] == Stage.BLENDING and slot["alpha_target"] == 0


def next_step(slot: dict[str, float], op: Op | str) -> Stage | None:
    """Stage that an operation brings a slot to, None where the structure forbids it."""
    stage, resting = slot["stage"], slot["alpha_mode"] == AlphaMode.HOLD
    if op == Op.GERMINATE:
        return Stage.GERMINATED if stage == Stage.DORMANT else None
    if op == Op.ADVANCE:
        if stage == Stage.BLENDING:
            return None if fading(slot) else Stage.PROBATIONARY
        return {Stage.GERMINATED: Stage.TRAINING, Stage.TRAINING: Stage.BLENDING}.get(stage)
    if op == Op.FOSSILIZE:
        return Stage.FOSSILIZED if stage == Stage.PROBATIONARY else None
    if op == Op.CULL:
        alive = (Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY)
        return Stage.CULLED if stage in alive else None
    if op in (Op.SET_ALPHA_TARGET, GRADUAL):
        return Stage.BLENDING if stage in (Stage.BLENDING, Stage.PROBATIONARY) and resting else None
    raise KeyError(op)


def failed_checks(slot: dict[str, float], entered: Stage, limits: GateConfig, host_loss: float) -> list[Check]:
    """Checks of the gate in front of a stage that a slot does not pass, in order."""
    ratio = slot["gradient_ratio"]
    asked: dict[Stage, dict[Check, bool]] = {
        Stage.TRAINING: {Check.HOST_LOSS: math.isfinite(host_loss)},
        Stage.BLENDING: {
            Check.TRAINING_DECISIONS: slot["stage_age"] >= limits.min_training_decisions,
            Check.GRADIENT_FINITE: math.isfinite(slot["gradient_norm"]),
            Check.GRADIENT_VANISHING: limits.min_gradient_ratio < ratio < math.inf,
            Check.GRADIENT_EXPLODING: ratio < limits.max_gradient_ratio,
            Check.INCUBATOR_GAIN: math.isfinite(slot["incubator_gain_se"])
            and limits.min_incubator_gain + limits.incubator_gain_errors * slot["incubator_gain_se"]
            < slot["incubator_gain"]
            < math.inf,
        },
        Stage.PROBATIONARY: {
            Check.ALPHA_AT_TARGET: slot["alpha_mode"] == AlphaMode.HOLD and slot["alpha"] == slot["alpha_target"]
        },
        Stage.FOSSILIZED: {
            Check.PROBATION_DECISIONS: slot["stage_age"] >= limits.min_probation_decisions,
            Check.CONTRIBUTION: math.isfinite(slot["contribution_se"])
            and limits.min_contribution + limits.contribution_errors * slot["contribution_se"]
            < slot["contribution"]
            < math.inf,
        },
    }
    return [check for check, passed in asked[entered].items() if not passed]


class Oracle:
    """Rows of slots under the rules of the lifecycle."""

    def __init__(
        self,
        rows: int,
        fitting: list[set[int]],
        embargo: int,
        limits: GateConfig,
        numbers: Callable[[int, int, int], int],
    ) -> None:
        """`fitting`: blueprints of each slot; `numbers`: learned numbers of (slot, blueprint, operator)."""
        self.fitting, self.embargo, self.limits, self.numbers = fitting, embargo, limits, numbers
        self.sizes = head_sizes(len(fitting))
        self.slots = [[empty_slot() for _ in fitting] for _ in range(rows)]
        self.seeds_made = [0] * rows

    def decide(self, actions: list[list[int]], host_loss: list[float]) -> list[tuple[Check, Stage | None]]:
        """One decision of every row: the check that refused, and the stage of the named slot after the action."""
        results = []
        for r, action in enumerate(actions):
            refused = self.refusal(r, action, host_loss[r])
            entered = None
            if refused == Check.NONE and action[Head.OP] != Op.WAIT:
                entered = self._perform(r, action)
            results.append((refused, entered))
        for row in self.slots:
            for slot in row:
                self._clock(slot)
        return results

    def refusal(self, r: int, action: list[int], host_loss: float) -> Check:
        """First of the checks, in their order, that an action does not pass."""
        if not 0 <= action[Head.OP] < len(Op):
            return Check.RANGE
        op = Op(action[Head.OP])
        if any(not 0 <= action[head] < self.sizes[head] for head in HEADS_OF_OP[op]):
            return Check.RANGE
        if op == Op.WAIT:
            return Check.NONE
        slot = self.slots[r][action[Head.SLOT]]
        entered = next_step(slot, op)
        if entered is None:
            return Check.STAGE
        if op == Op.GERMINATE and action[Head.BLUEPRINT] not in self.fitting[action[Head.SLOT]]:
            return Check.BLUEPRINT
        if op == Op.CULL and ALPHA_SPEEDS[action[Head.ALPHA_SPEED]] > 0 and next_step(slot, GRADUAL) is None:
            return Check.SPEED
        if op in (Op.ADVANCE, Op.FOSSILIZE):
            for check in failed_checks(slot, entered, self.limits, host_loss):
                return check
        return Check.NONE

    def _perform(self, r: int, action: list[int]) -> Stage:
        op, s = Op(action[Head.OP]), action[Head.SLOT]
        slot = self.slots[r][s]
        if op == Op.GERMINATE:
            operator, curve = _STYLES[Style(action[Head.STYLE])]
            slot.update(
                stage=Stage.GERMINATED,
                stage_age=0,
                blueprint=action[Head.BLUEPRINT],
                operator=operator,
                curve=curve,
                ramp_total=TEMPOS[action[Head.TEMPO]],
                alpha_target=ALPHA_TARGETS[action[Head.ALPHA_TARGET]],
                seed_id=self.seeds_made[r],
                parameters=self.numbers(s, action[Head.BLUEPRINT], operator),
            )
            self.seeds_made[r] += 1
        elif op == Op.ADVANCE:
            entered = next_step(slot, op)
            slot.update(stage=entered, stage_age=0)
            if entered == Stage.BLENDING:
                slot["alpha_mode"] = AlphaMode.UP
        elif op == Op.FOSSILIZE:
            slot.update(stage=Stage.FOSSILIZED, stage_age=0)
        else:
            speed, curve = ALPHA_SPEEDS[action[Head.ALPHA_SPEED]], action[Head.ALPHA_CURVE]
            if op == Op.SET_ALPHA_TARGET:
                self._aim(slot, ALPHA_TARGETS[action[Head.ALPHA_TARGET]], speed, curve)
            elif speed:
                self._aim(slot, 0.0, speed, curve)
            else:
                self._empty(slot)
        return Stage(int(slot["stage"]))

    def _aim(self, slot: dict[str, float], target: float, speed: int, curve: int) -> None:
        """Give alpha a new target: at once where the speed is 0, with a new ramp from here otherwise."""
        slot.update(stage=Stage.BLENDING, stage_age=0)
        slot.update(alpha_start=slot["alpha"], alpha_target=target, curve=curve, ramp_done=0, ramp_total=speed)
        if speed == 0:
            slot["alpha"] = target
        distance = target - slot["alpha"]
        slot["alpha_mode"] = AlphaMode.UP if distance > 0 else AlphaMode.DOWN if distance < 0 else AlphaMode.HOLD

    def _empty(self, slot: dict[str, float]) -> None:
        slot.update(empty_slot())
        slot.update(stage=Stage.CULLED, cooldown=None)  # The clock fills it in at the end of this decision.

    def _clock(self, slot: dict[str, float]) -> None:
        """The end of a decision."""
        slot["stage_age"] += 1
        if slot["seed_id"] >= 0:
            slot["age"] += 1
        if slot["alpha_mode"] != AlphaMode.HOLD:
            slot["ramp_done"] += 1
            if slot["ramp_done"] == slot["ramp_total"]:
                slot["alpha"], slot["alpha_mode"] = slot["alpha_target"], AlphaMode.HOLD
            else:
                height = curve_height(int(slot["curve"]), int(slot["ramp_done"]), int(slot["ramp_total"]))
                slot["alpha"] = slot["alpha_start"] + (slot["alpha_target"] - slot["alpha_start"]) * height
        if fading(slot) and slot["alpha"] == 0:
            self._empty(slot)
        if slot["stage"] == Stage.CULLED and slot["cooldown"] is None:
            slot["cooldown"] = 1
        elif slot["cooldown"] > 1:
            slot["cooldown"] -= 1
        elif slot["cooldown"] == 1:
            following, decisions = {
                Stage.CULLED: (Stage.EMBARGOED, self.embargo),
                Stage.EMBARGOED: (Stage.RESETTING, 1),
                Stage.RESETTING: (Stage.DORMANT, 0),
            }[Stage(int(slot["stage"]))]
            slot.update(stage=following, cooldown=decisions, stage_age=0)
