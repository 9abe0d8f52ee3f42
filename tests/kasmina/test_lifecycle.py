"""The slot machine against its plain model, its invariants, and the table of what is allowed where."""

import random
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from esper.kasmina.blueprints.registry import seed_parameters
from esper.kasmina.gates import Gates
from esper.kasmina.lifecycle import Lifecycle
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
    SiteKind,
    Style,
    head_sizes,
)
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_CHECKS, Check, Gate, GateReport
from esper.leyline.config import GateConfig
from esper.leyline.sites import Site, SlotConfig, fit_table
from esper.leyline.slots import EMPTY_SLOT, AlphaMode, SlotTensors
from esper.leyline.stages import OCCUPIED_STAGES, VALID_TRANSITIONS, Stage
from helpers.slot_oracle import GRADUAL, MEASURED, Oracle, next_step

NAN, INF = float("nan"), float("inf")
SLOTS = SlotConfig.of_chain(
    (Site(SiteKind.IMAGE, 5, (4, 4), 1), Site(SiteKind.SIGNAL, 6, (7,), 2), Site(SiteKind.VECTOR, 8, (), 3))
)
ALLOWED = frozenset({Blueprint.NORM, Blueprint.BOTTLENECK, Blueprint.CONV_LIGHT, Blueprint.MLP_SMALL})
FITS_SB = fit_table(SLOTS, ALLOWED)
FITTING: list[set[int]] = [{b for b in Blueprint if FITS_SB[s, b]} for s in range(SLOTS.slots)]
SIZES = head_sizes(SLOTS.slots)
LIMITS = GateConfig(min_training_decisions=2, min_probation_decisions=2, min_incubator_gain=0.1, min_contribution=-0.2)
GOOD = {"gradient_norm": 1.0, "gradient_ratio": 1.0, "incubator_gain": 1.0, "contribution": 1.0}
BAD = [
    {"contribution": NAN},
    {"incubator_gain": -INF},
    {"gradient_norm": INF},
    {"gradient_ratio": 1e-4},
    {"gradient_ratio": 1e6},
]
FULL_ALPHA = ALPHA_TARGETS.index(1.0)
INTEGERS = [name for name, value in EMPTY_SLOT.items() if isinstance(value, int)]


def numbers(slot: int, blueprint: int, operator: int) -> int:
    return seed_parameters(Blueprint(blueprint), Operator(operator), SLOTS.sites[slot])


def make_lifecycle(embargo: int = 5, fits_SB: torch.Tensor = FITS_SB) -> Lifecycle:
    return Lifecycle(SLOTS, fits_SB, embargo)


class Machine:
    """`Lifecycle` and the plain model side by side; every decision compares them and checks the invariants."""

    def __init__(self, rows: int, embargo: int, limits: GateConfig = LIMITS) -> None:
        self.lifecycle, self.gates = make_lifecycle(embargo), Gates(limits, "cpu")
        self.slots = SlotTensors.empty(rows, SLOTS.slots)
        self.oracle = Oracle(rows, FITTING, embargo, limits, numbers)
        self.rows, self.embargo = rows, embargo
        self.embargoed: dict[tuple[int, int], int] = {}
        self.transitions: set[tuple[Stage, Stage]] = set()
        self.refusals: set[Check] = set()

    def measure(self, r: int, s: int, values: dict[str, float]) -> None:
        """Write measurements where there is a seed, as the engine does."""
        if self.oracle.slots[r][s]["seed_id"] >= 0:
            self.oracle.slots[r][s].update(values)
            for name, value in values.items():
                getattr(self.slots, name)[r, s] = value

    def decide(self, actions: list[list[int]], host_loss: list[float]) -> None:
        slots, given = self.slots, torch.tensor(actions)
        old = slots.clone()
        asked = [self._stage_named(old, r, action) for r, action in enumerate(actions)]
        outcome = self.lifecycle.apply(slots, given, self.gates.report(slots, torch.tensor(host_loss)))
        assert given.tolist() == actions, "the actions are read only"
        self._check_apply(old, actions, outcome.refused_by)
        applied = slots.clone()
        self.lifecycle.tick(slots)
        results = self.oracle.decide(actions, host_loss)
        self._check_transitions(old.stage, applied.stage)
        self._check_transitions(applied.stage, slots.stage)
        self._check_transitions(old.stage, slots.stage)
        self._check_alpha(applied)
        self._check_embargo()
        for r, (refused, entered) in enumerate(results):
            self.refusals.add(refused)
            assert Check(int(outcome.refused_by[r])) == refused
            assert outcome.accepted[r].item() == (refused == Check.NONE)
            if entered is not None:
                assert outcome.before[r] == asked[r]
                assert outcome.after[r] == entered
            else:
                assert outcome.before[r] == outcome.after[r]
                if refused not in (Check.NONE, Check.RANGE):
                    assert outcome.before[r] == asked[r]
        self._compare()

    @staticmethod
    def _stage_named(old: SlotTensors, r: int, action: list[int]) -> int:
        inside = 0 <= action[Head.SLOT] < SLOTS.slots
        return int(old.stage[r, action[Head.SLOT]]) if inside else -1

    def _check_apply(self, old: SlotTensors, actions: list[list[int]], refused: torch.Tensor) -> None:
        """A refused action and WAIT change nothing; any other changes the named slot alone; a fossil never changes."""
        for field in fields(SlotTensors):
            before, after = getattr(old, field.name), getattr(self.slots, field.name)
            same = (before == after) | (before.isnan() & after.isnan())
            for r, action in enumerate(actions):
                if refused[r] != int(Check.NONE) or action[Head.OP] == Op.WAIT:
                    assert same[r].all(), field.name
                elif field.name != "seeds_made":
                    others = [s for s in range(SLOTS.slots) if s != action[Head.SLOT]]
                    assert same[r, others].all(), field.name
        fossil = old.stage == int(Stage.FOSSILIZED)
        assert (self.slots.stage[fossil] == int(Stage.FOSSILIZED)).all()
        retargeted = (old.alpha_target != self.slots.alpha_target) & (old.stage != int(Stage.DORMANT))
        culled = self.slots.stage == int(Stage.CULLED)
        assert (old.alpha_mode[retargeted & ~culled] == int(AlphaMode.HOLD)).all(), "a new target only in HOLD"

    def _check_transitions(self, before: torch.Tensor, after: torch.Tensor) -> None:
        for old, new in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
            if old != new:
                assert Stage(new) in VALID_TRANSITIONS[Stage(old)]
                self.transitions.add((Stage(old), Stage(new)))

    def _check_alpha(self, applied: SlotTensors) -> None:
        """What the clock did to alpha: nothing at rest; on a ramp one way, landing exactly."""
        alive = self.slots.seed_id >= 0
        moving = alive & (applied.alpha_mode != int(AlphaMode.HOLD))
        rest = alive & ~moving
        now, was, target = self.slots.alpha, applied.alpha, applied.alpha_target
        assert torch.equal(now[rest], was[rest])
        assert torch.equal(self.slots.alpha_target[alive], target[alive])
        up = moving & (applied.alpha_mode == int(AlphaMode.UP))
        down = moving & (applied.alpha_mode == int(AlphaMode.DOWN))
        assert ((now >= was) & (now <= target))[up].all()
        assert ((now <= was) & (now >= target))[down].all()
        landed = moving & (self.slots.alpha_mode == int(AlphaMode.HOLD))
        assert torch.equal(now[landed], target[landed])
        assert torch.equal(landed, moving & (applied.ramp_done + 1 == applied.ramp_total))
        fossil = applied.stage == int(Stage.FOSSILIZED)
        assert torch.equal(now[fossil], was[fossil])

    def _check_embargo(self) -> None:
        """Count the decisions in which a slot is seen EMBARGOED."""
        for r in range(self.rows):
            for s in range(SLOTS.slots):
                if self.slots.stage[r, s] == int(Stage.EMBARGOED):
                    self.embargoed[r, s] = self.embargoed.get((r, s), 0) + 1
                elif (r, s) in self.embargoed:
                    assert self.embargoed.pop((r, s)) == self.embargo

    def _compare(self) -> None:
        """Every field of every slot: counts and indices exactly, alpha up to the rounding of float32."""
        assert self.slots.seeds_made.tolist() == self.oracle.seeds_made
        for name in EMPTY_SLOT:
            told = getattr(self.slots, name).tolist()
            expected = [[slot[name] for slot in row] for row in self.oracle.slots]
            if name in INTEGERS:
                assert told == expected, name
            elif name in MEASURED:
                assert told == [[pytest.approx(v, rel=1e-6, nan_ok=True) for v in row] for row in expected], name
            else:
                assert told == [[pytest.approx(v, rel=0, abs=1e-6) for v in row] for row in expected], name
        for row in self.oracle.slots:
            for slot in row:
                assert (slot["seed_id"] >= 0) == (slot["stage"] in OCCUPIED_STAGES)

    def possible(self, r: int) -> list[tuple[int, int, bool]]:
        """(op, slot, gradual) that the structure of a row allows now."""
        ops = [*(op for op in Op if op is not Op.WAIT), GRADUAL]
        return [
            (int(Op.CULL) if op == GRADUAL else int(op), s, op == GRADUAL)
            for s, slot in enumerate(self.oracle.slots[r])
            for op in ops
            if next_step(slot, op) is not None
        ]


def complete(op: int, slot: int, gradual: bool, heads: list[int]) -> list[int]:
    """Turn a possible operation into an action, the other heads chosen by any numbers."""
    action = [op, slot, *(n % SIZES[head] for head, n in zip(list(Head)[2:], heads, strict=True))]
    fitting = sorted(FITTING[slot])
    action[Head.BLUEPRINT] = fitting[heads[0] % len(fitting)]
    if op == Op.CULL:
        action[Head.ALPHA_SPEED] = 1 + heads[0] % (len(ALPHA_SPEEDS) - 1) if gradual else 0
    return action


wild_actions = st.tuples(*[st.integers(-2, SIZES[head] + 1) for head in Head]).map(list)
tame_actions = st.tuples(*[st.integers(0, SIZES[head] - 1) for head in Head]).map(list)
measurements = st.one_of(
    st.just(GOOD),
    st.fixed_dictionaries(
        {
            "gradient_norm": st.sampled_from([NAN, INF, 0.0, 1.0, 1e30]),
            "gradient_ratio": st.sampled_from([NAN, INF, 0.0, 1e-4, 1e-3, 0.5, 999.0, 1000.0]),
            "incubator_gain": st.sampled_from([NAN, INF, -INF, 0.0, 0.1, 0.2]),
            "contribution": st.sampled_from([NAN, INF, -INF, -0.2, -0.1, 0.0]),
        }
    ),
    st.sampled_from(BAD).map(lambda bad: GOOD | bad),
)
losses = st.sampled_from([1.0, 1.0, 2.0, NAN, INF])


class LifecycleMachine(RuleBasedStateMachine):
    """Arbitrary decisions: half of the rows do what the structure allows, the others whatever comes."""

    @initialize(rows=st.integers(1, 3), embargo=st.integers(1, 5))
    def start(self, rows: int, embargo: int) -> None:
        self.machine = Machine(rows, embargo)

    @rule(data=st.data())
    def decide(self, data: Any) -> None:
        machine = self.machine
        actions = []
        for r in range(machine.rows):
            possible = machine.possible(r)
            way = data.draw(st.integers(0, 5))
            if possible and way < 4:
                chosen = data.draw(st.sampled_from(possible))
                actions.append(complete(*chosen, data.draw(st.tuples(*[st.integers(0, 59)] * 6))))
            else:
                actions.append(data.draw(wild_actions if way == 4 else tame_actions))
            for s in range(SLOTS.slots):
                if machine.oracle.slots[r][s]["seed_id"] >= 0:
                    machine.measure(r, s, data.draw(measurements))
        machine.decide(actions, [data.draw(losses) for _ in range(machine.rows)])

    @rule(decisions=st.integers(1, 8))
    def wait(self, decisions: int) -> None:
        for _ in range(decisions):
            self.machine.decide([[0] * HEAD_COUNT] * self.machine.rows, [1.0] * self.machine.rows)


LifecycleMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestLifecycleMachine = LifecycleMachine.TestCase


@pytest.mark.parametrize("embargo", [1, 5])
def test_a_long_random_life_agrees_with_the_plain_model_and_goes_everywhere(embargo):
    """Many rows for many decisions; each transition and each refusal that exists must have happened."""
    choose = random.Random(embargo)
    machine = Machine(32, embargo)
    for _ in range(160):
        actions = []
        for r in range(machine.rows):
            way, possible = choose.random(), machine.possible(r)
            for s in range(SLOTS.slots):
                machine.measure(r, s, GOOD | (choose.choice(BAD) if choose.random() < 0.4 else {}))
            if way < 0.15:
                actions.append([choose.randrange(-1, SIZES[head] + 1) for head in Head])
            elif way < 0.35:
                actions.append([choose.randrange(SIZES[head]) for head in Head])
            elif way < 0.7 and possible:
                # Mostly growth: a row that culls at every chance never gets far.
                growing = [p for p in possible if p[0] != Op.CULL] or possible
                picked = choose.choice(growing if choose.random() < 0.8 else possible)
                actions.append(complete(*picked, [choose.randrange(60) for _ in range(6)]))
            else:
                actions.append([0] * HEAD_COUNT)
        machine.decide(actions, [choose.choice([1.0, 1.0, 1.0, NAN, INF]) for _ in range(machine.rows)])
    assert machine.transitions == {(a, b) for a, targets in VALID_TRANSITIONS.items() for b in targets}
    assert machine.refusals == set(Check)


# --- What is allowed where ---


def passing(*failing: Check, rows: int = 1) -> GateReport:
    """Every check of every slot passes, but for these."""
    passed = torch.tensor([check not in failing for check in ALL_GATE_CHECKS])[:, None, None]
    passed = passed.expand(-1, rows, SLOTS.slots).clone()
    return GateReport(passed.float(), passed, torch.zeros(len(ALL_GATE_CHECKS)))


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
