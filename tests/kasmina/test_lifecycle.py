"""What is allowed where, and lives of slots decision by decision; the plain model is in `test_lifecycle_oracle`."""

from dataclasses import fields

import pytest
import torch

from esper.kasmina.gates import Gates
from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    HEAD_COUNT,
    HEADS_OF_OP,
    TEMPOS,
    Blueprint,
    Curve,
    Head,
    Op,
    Operator,
    Style,
)
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, Check, Gate, GateReport
from esper.leyline.slots import EMPTY_SLOT, AlphaMode, SlotTensors
from esper.leyline.stages import OCCUPIED_STAGES, VALID_TRANSITIONS, Stage
from helpers.lifecycle_pair import FITS_SB, FITTING, LIMITS, SIZES, SLOTS, make_lifecycle, numbers
from helpers.slot_oracle import MEASURED

FULL_ALPHA = ALPHA_TARGETS.index(1.0)


def passing(*failing: Check, rows: int = 1) -> GateReport:
    """Every check of every slot passes, but for these."""
    passed = torch.tensor([check not in failing for check in ALL_GATE_CHECKS])[:, None, None]
    passed = passed.expand(-1, rows, SLOTS.slots).clone()
    return GateReport(passed.float(), passed, torch.zeros(passed.shape))


def action_of(op: Op, slot: int = 2, **heads: int) -> list[int]:
    """An action with valid choices everywhere; `heads` by their lower-case names."""
    action = [int(op), slot, int(Blueprint.MLP_SMALL), 0, 0, FULL_ALPHA, 0, 0]
    for name, choice in heads.items():
        action[Head[name.upper()]] = choice
    return action


def slot_at(stage: Stage, mode: AlphaMode = AlphaMode.HOLD, **values: float) -> SlotTensors:
    """One row; slot 2 stands at a stage as a life of ordinary actions would leave it, the others are empty."""
    slots = SlotTensors.empty(1, SLOTS.slots)
    state: dict[str, float] = {"stage": int(stage)}
    if stage in OCCUPIED_STAGES:
        state |= {"blueprint": int(Blueprint.MLP_SMALL), "seed_id": 0, "alpha_target": 0.7, "ramp_total": 5}
        state |= {"parameters": numbers(2, Blueprint.MLP_SMALL, Operator.ADD), "stage_age": 9, "age": 20}
        slots.seeds_made[0] = 1
    if stage in (Stage.BLENDING, Stage.PROBATIONARY, Stage.FOSSILIZED):
        state |= {"alpha": 0.7, "ramp_done": 5}
    if mode is not AlphaMode.HOLD:
        state |= {"alpha_mode": int(mode), "alpha": 0.3, "ramp_done": 2}
    if stage in (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING):
        state["cooldown"] = 1
    for name, value in {**state, **values}.items():
        getattr(slots, name)[0, 2] = value
    return slots


SITUATIONS: dict[str, tuple[Stage, AlphaMode, dict[str, float]]] = {
    **{stage.name: (stage, AlphaMode.HOLD, {}) for stage in Stage},
    "BLENDING up": (Stage.BLENDING, AlphaMode.UP, {}),
    "BLENDING down": (Stage.BLENDING, AlphaMode.DOWN, {}),
    "fading": (Stage.BLENDING, AlphaMode.DOWN, {"alpha_target": 0.0}),
}
OPERATIONS: dict[str, list[int]] = {
    **{op.name: action_of(op) for op in Op},
    "CULL slowly": action_of(Op.CULL, alpha_speed=2),
    "SET_ALPHA_TARGET slowly": action_of(Op.SET_ALPHA_TARGET, alpha_speed=1),
}
BLENDED = {
    "CULL": Stage.CULLED,
    "CULL slowly": Stage.BLENDING,
    "SET_ALPHA_TARGET": Stage.BLENDING,
    "SET_ALPHA_TARGET slowly": Stage.BLENDING,
}
ALLOWED_OPERATIONS: dict[str, dict[str, Stage]] = {
    "DORMANT": {"GERMINATE": Stage.GERMINATED},
    "GERMINATED": {"ADVANCE": Stage.TRAINING, "CULL": Stage.CULLED},
    "TRAINING": {"ADVANCE": Stage.BLENDING, "CULL": Stage.CULLED},
    "BLENDING": {"ADVANCE": Stage.PROBATIONARY, **BLENDED},
    # The structure lets a moving seed advance: gate G3 does not.
    "BLENDING up": {"ADVANCE": Stage.PROBATIONARY, "CULL": Stage.CULLED},
    "BLENDING down": {"ADVANCE": Stage.PROBATIONARY, "CULL": Stage.CULLED},
    "fading": {"CULL": Stage.CULLED},
    "PROBATIONARY": {"FOSSILIZE": Stage.FOSSILIZED, **BLENDED},
}
TOO_FAST = {"GERMINATED", "TRAINING", "BLENDING up", "BLENDING down", "fading"}
"""May be culled, but not slowly."""


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_operation_at_every_stage(situation, operation):
    stage, mode, values = SITUATIONS[situation]
    slots = slot_at(stage, mode, **values)
    before = slots.clone()
    outcome = make_lifecycle().apply(slots, torch.tensor([OPERATIONS[operation]]), passing())
    entered = stage if operation == "WAIT" else ALLOWED_OPERATIONS.get(situation, {}).get(operation)
    assert outcome.before.item() == stage
    if entered is not None:
        assert Check(outcome.refused_by.item()) == Check.NONE
        assert outcome.accepted.item()
        assert outcome.after.item() == slots.stage[0, 2].item() == entered
        assert entered == stage or entered in VALID_TRANSITIONS[stage]
    else:
        slow = operation == "CULL slowly" and situation in TOO_FAST
        assert Check(outcome.refused_by.item()) == (Check.SPEED if slow else Check.STAGE)
        assert not outcome.accepted.item()
        assert outcome.after.item() == stage
    if entered is None or operation == "WAIT":
        assert_same(slots, before)


def test_every_transition_of_the_table_is_made_by_an_operation_or_by_the_clock():
    made = {
        (SITUATIONS[situation][0], entered)
        for situation, operations in ALLOWED_OPERATIONS.items()
        for entered in operations.values()
        if SITUATIONS[situation][0] != entered
    }
    for stage in (Stage.CULLED, Stage.EMBARGOED, Stage.RESETTING):
        slots = slot_at(stage)
        make_lifecycle().tick(slots)
        made.add((stage, Stage(slots.stage[0, 2].item())))
    assert made == {(a, b) for a, targets in VALID_TRANSITIONS.items() for b in targets}


def assert_same(slots: SlotTensors, other: SlotTensors) -> None:
    for field in fields(SlotTensors):
        told, expected = getattr(slots, field.name), getattr(other, field.name)
        assert torch.equal(told.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), field.name


GATED = {
    Gate.G1: (Stage.GERMINATED, Op.ADVANCE, Stage.TRAINING),
    Gate.G2: (Stage.TRAINING, Op.ADVANCE, Stage.BLENDING),
    Gate.G3: (Stage.BLENDING, Op.ADVANCE, Stage.PROBATIONARY),
    Gate.G5: (Stage.PROBATIONARY, Op.FOSSILIZE, Stage.FOSSILIZED),
}
CHECK_CASES = [(gate, check) for gate, checks in GATE_CHECKS.items() for check in checks]


@pytest.mark.parametrize(("gate", "check"), CHECK_CASES)
def test_each_check_alone_refuses_with_its_own_name(gate, check):
    stage, op, _ = GATED[gate]
    slots = slot_at(stage)
    before = slots.clone()
    outcome = make_lifecycle().apply(slots, torch.tensor([action_of(op)]), passing(check))
    assert Check(outcome.refused_by.item()) == check
    assert not outcome.accepted.item()
    assert_same(slots, before)


@pytest.mark.parametrize(("gate", "check"), CHECK_CASES)
def test_of_several_failing_checks_the_first_refuses(gate, check):
    stage, op, _ = GATED[gate]
    later = GATE_CHECKS[gate][GATE_CHECKS[gate].index(check) :]
    outcome = make_lifecycle().apply(slot_at(stage), torch.tensor([action_of(op)]), passing(*later))
    assert Check(outcome.refused_by.item()) == check


@pytest.mark.parametrize("gate", Gate)
def test_the_checks_of_other_gates_are_not_asked(gate):
    stage, op, entered = GATED[gate]
    others = [check for check in ALL_GATE_CHECKS if check not in GATE_CHECKS[gate]]
    outcome = make_lifecycle().apply(slot_at(stage), torch.tensor([action_of(op)]), passing(*others))
    assert outcome.accepted.item()
    assert outcome.after.item() == entered


@pytest.mark.parametrize("gate", Gate)
def test_a_gate_is_asked_of_the_named_slot_in_its_own_row(gate):
    """Two rows: the gates are open in one slot of the first row alone."""
    stage, op, _ = GATED[gate]
    slots = SlotTensors(
        **{
            f.name: torch.cat([getattr(slot_at(stage), f.name), getattr(slot_at(stage), f.name)])
            for f in fields(SlotTensors)
        }
    )
    report = passing(*GATE_CHECKS[gate], rows=2)
    report.passed_CRS[:, 0, 2] = True
    outcome = make_lifecycle().apply(slots, torch.tensor([action_of(op)] * 2), report)
    assert outcome.accepted.tolist() == [True, False]
    assert Check(outcome.refused_by[1].item()) == GATE_CHECKS[gate][0]


@pytest.mark.parametrize("operation", [op for op in OPERATIONS if op not in ("ADVANCE", "FOSSILIZE")])
@pytest.mark.parametrize("situation", ["DORMANT", "PROBATIONARY"])
def test_gates_do_not_concern_other_operations(operation, situation):
    stage, mode, values = SITUATIONS[situation]
    action = torch.tensor([OPERATIONS[operation]])
    outcomes = [
        make_lifecycle().apply(slot_at(stage, mode, **values), action, report)
        for report in (passing(), passing(*ALL_GATE_CHECKS))
    ]
    assert outcomes[0].refused_by.item() == outcomes[1].refused_by.item()


def test_moving_alpha_does_not_pass_the_real_gate():
    for mode in (AlphaMode.UP, AlphaMode.DOWN, AlphaMode.HOLD):
        slots = slot_at(Stage.BLENDING, mode)
        report = Gates(LIMITS, "cpu").report(slots, torch.ones(1))
        outcome = make_lifecycle().apply(slots, torch.tensor([action_of(Op.ADVANCE)]), report)
        expected = Check.NONE if mode is AlphaMode.HOLD else Check.ALPHA_AT_TARGET
        assert Check(outcome.refused_by.item()) == expected


@pytest.mark.parametrize("blueprint", Blueprint)
@pytest.mark.parametrize("slot", range(SLOTS.slots))
def test_only_a_blueprint_that_fits_the_slot_germinates(blueprint, slot):
    slots = SlotTensors.empty(1, SLOTS.slots)
    action = torch.tensor([action_of(Op.GERMINATE, slot, blueprint=int(blueprint))])
    outcome = make_lifecycle().apply(slots, action, passing())
    fits = blueprint in FITTING[slot]
    assert Check(outcome.refused_by.item()) == (Check.NONE if fits else Check.BLUEPRINT)
    assert slots.blueprint[0, slot].item() == (blueprint if fits else Blueprint.NOOP)
    assert slots.seeds_made.item() == fits


def test_where_nothing_fits_the_blueprint_is_what_refuses():
    """The slot is dormant and its alpha rests, so its stage forbids nothing."""
    fits_SB = FITS_SB.clone()
    fits_SB[2] = False
    slots = SlotTensors.empty(1, SLOTS.slots)
    outcome = make_lifecycle(fits_SB=fits_SB).apply(slots, torch.tensor([action_of(Op.GERMINATE)]), passing())
    assert Check(outcome.refused_by.item()) == Check.BLUEPRINT


LEGAL_SITUATION = {
    Op.WAIT: "DORMANT",
    Op.GERMINATE: "DORMANT",
    Op.SET_ALPHA_TARGET: "PROBATIONARY",
    Op.CULL: "PROBATIONARY",
    Op.FOSSILIZE: "PROBATIONARY",
    Op.ADVANCE: "TRAINING",
}


@pytest.mark.parametrize("op", Op)
@pytest.mark.parametrize("head", Head)
@pytest.mark.parametrize("far", [0, 1000, 2**40])
@pytest.mark.parametrize("side", ["below", "above"])
def test_a_choice_that_does_not_exist_is_refused_where_the_operation_uses_the_head(op, head, far, side):
    wild = -1 - far if side == "below" else SIZES[head] + far
    situation = LEGAL_SITUATION[op]
    action = action_of(op)
    slots, expected = slot_at(SITUATIONS[situation][0]), slot_at(SITUATIONS[situation][0])
    if head in HEADS_OF_OP[op]:
        action[head] = wild
        outcome = make_lifecycle().apply(slots, torch.tensor([action]), passing())
        assert Check(outcome.refused_by.item()) == Check.RANGE
        assert outcome.before.item() == outcome.after.item()
    else:
        make_lifecycle().apply(expected, torch.tensor([action]), passing())
        action[head] = wild
        outcome = make_lifecycle().apply(slots, torch.tensor([action]), passing())
        assert outcome.accepted.item()
    assert_same(slots, expected)


@pytest.mark.parametrize(
    "actions",
    [
        torch.zeros(1, HEAD_COUNT + 1, dtype=torch.int64),
        torch.zeros(2, HEAD_COUNT, dtype=torch.int64),
        torch.zeros(HEAD_COUNT, dtype=torch.int64),
        torch.zeros(1, HEAD_COUNT, dtype=torch.int32),
        torch.zeros(1, HEAD_COUNT),
    ],
)
def test_actions_of_another_shape_or_dtype_raise(actions):
    slots = SlotTensors.empty(1, SLOTS.slots)
    with pytest.raises(ValueError, match="actions must be int64"):
        make_lifecycle().apply(slots, actions, passing())
    assert_same(slots, SlotTensors.empty(1, SLOTS.slots))


# --- Lives, decision by decision ---


class Life:
    """Slot 2 of one row under ordinary decisions with open gates."""

    def __init__(self, embargo: int = 5, stage: Stage = Stage.DORMANT) -> None:
        self.lifecycle = make_lifecycle(embargo)
        self.slots = slot_at(stage)

    def decide(self, op: Op = Op.WAIT, **heads: int) -> dict[str, float]:
        moving = self.slots.alpha_mode != int(AlphaMode.HOLD)
        report = passing()
        report.passed_CRS[ALL_GATE_CHECKS.index(Check.ALPHA_AT_TARGET)] = ~moving
        self.lifecycle.apply(self.slots, torch.tensor([action_of(op, **heads)]), report)
        self.lifecycle.tick(self.slots)
        return {f.name: getattr(self.slots, f.name)[0, 2].item() for f in fields(SlotTensors) if f.name != "seeds_made"}


@pytest.mark.parametrize("embargo", [1, 2, 5, 9])
@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.PROBATIONARY])
def test_the_way_back_after_a_cull(stage, embargo):
    life = Life(embargo, stage)
    seen = [Stage(life.decide(Op.CULL)["stage"])]
    while seen[-1] is not Stage.DORMANT and len(seen) < 40:
        seen.append(Stage(life.decide(Op.GERMINATE)["stage"]))
    assert seen == [Stage.CULLED, *[Stage.EMBARGOED] * embargo, Stage.RESETTING, Stage.DORMANT]
    assert life.slots.cooldown[0, 2] == 0
    germinated = life.decide(Op.GERMINATE)
    assert germinated["stage"] == Stage.GERMINATED
    assert germinated["seed_id"] == 1, "seeds are numbered for life"


@pytest.mark.parametrize("embargo", [1, 5])
@pytest.mark.parametrize("speed", range(1, len(ALPHA_SPEEDS)))
@pytest.mark.parametrize("stage", [Stage.BLENDING, Stage.PROBATIONARY])
def test_a_gradual_cull_fades_for_its_decisions_and_then_goes_the_same_way(stage, speed, embargo):
    life = Life(embargo, stage)
    states = [life.decide(Op.CULL, alpha_speed=speed, alpha_curve=int(Curve.COSINE))]
    while states[-1]["stage"] != Stage.DORMANT and len(states) < 40:
        # Neither can be done to a fading seed.
        states.append(life.decide(Op.ADVANCE if len(states) % 2 else Op.SET_ALPHA_TARGET))
    decisions = ALPHA_SPEEDS[speed]
    fade = [Stage.BLENDING] * (decisions - 1)
    way = [Stage.CULLED, *[Stage.EMBARGOED] * embargo, Stage.RESETTING, Stage.DORMANT]
    assert [state["stage"] for state in states] == [*fade, *way]
    alphas = [state["alpha"] for state in states[:decisions]]
    assert alphas == sorted(set(alphas), reverse=True)
    assert alphas[0] < 0.7
    assert alphas[-1] == 0


@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.PROBATIONARY])
def test_a_cull_leaves_nothing_of_the_seed(stage):
    life = Life(stage=stage)
    for name in MEASURED:
        getattr(life.slots, name)[0, 2] = 3.0
    state = life.decide(Op.CULL)
    for name, value in EMPTY_SLOT.items():
        if name not in ("stage", "cooldown", "stage_age"):
            assert state[name] == pytest.approx(value, nan_ok=True), name


@pytest.mark.parametrize("tempo", range(len(TEMPOS)))
@pytest.mark.parametrize("style", Style)
@pytest.mark.parametrize("target", range(len(ALPHA_TARGETS)))
def test_a_whole_life(tempo, style, target):
    life = Life()
    state = life.decide(Op.GERMINATE, tempo=tempo, style=int(style), alpha_target=target)
    assert (state["stage"], state["alpha"], state["age"], state["stage_age"]) == (Stage.GERMINATED, 0, 1, 1)
    for expected in (Stage.TRAINING, Stage.BLENDING):
        state = life.decide(Op.ADVANCE)
        assert state["stage"] == expected
        assert state["stage_age"] == 1
    alphas = [0.0, state["alpha"]]
    while state["alpha_mode"] != AlphaMode.HOLD:
        state = life.decide(Op.ADVANCE)
        assert state["stage"] == Stage.BLENDING
        alphas.append(state["alpha"])
    assert len(alphas) == TEMPOS[tempo] + 1
    assert alphas == sorted(set(alphas))
    exact = torch.tensor(ALPHA_TARGETS[target]).item()
    assert alphas[-1] == exact
    assert life.decide(Op.ADVANCE)["stage"] == Stage.PROBATIONARY
    assert life.decide(Op.FOSSILIZE)["stage"] == Stage.FOSSILIZED
    for op in Op:
        state = life.decide(op)
        assert state["stage"] == Stage.FOSSILIZED
        assert state["alpha"] == exact
    assert state["age"] == 5 + TEMPOS[tempo] - 1 + len(Op)
    assert state["stage_age"] == 1 + len(Op)


def test_a_new_target_at_once_and_along_a_ramp():
    life = Life(stage=Stage.PROBATIONARY)
    half = ALPHA_TARGETS.index(0.5)
    state = life.decide(Op.SET_ALPHA_TARGET, alpha_target=half)
    assert (state["stage"], state["alpha"], state["alpha_mode"]) == (Stage.BLENDING, 0.5, AlphaMode.HOLD)
    assert life.decide(Op.ADVANCE)["stage"] == Stage.PROBATIONARY
    speed = ALPHA_SPEEDS.index(3)
    state = life.decide(Op.SET_ALPHA_TARGET, alpha_speed=speed, alpha_curve=int(Curve.LINEAR))
    ramp = [state["alpha"]]
    assert state["alpha_mode"] == AlphaMode.UP
    # While it moves there is no other target.
    ramp.append(life.decide(Op.SET_ALPHA_TARGET, alpha_target=half)["alpha"])
    state = life.decide(Op.SET_ALPHA_TARGET, alpha_target=half)
    assert [*ramp, state["alpha"]] == pytest.approx([0.5 + 0.5 / 3, 0.5 + 1 / 3, 1.0])
    assert state["alpha"] == 1
    assert state["alpha_mode"] == AlphaMode.HOLD
    state = life.decide(Op.SET_ALPHA_TARGET, alpha_target=half, alpha_speed=speed)
    assert state["alpha_mode"] == AlphaMode.DOWN
    assert state["alpha"] == pytest.approx(1 - 0.5 / 3)
