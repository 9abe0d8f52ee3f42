"""The lifecycle and its plain model side by side, on three slots of different kinds."""

from collections.abc import Sequence
from dataclasses import fields

import pytest
import torch

from esper.kasmina.blueprints.registry import seed_parameters
from esper.kasmina.gates import Gates
from esper.kasmina.lifecycle import Lifecycle
from esper.leyline.actions import ALPHA_SPEEDS, Blueprint, Head, Op, Operator, SiteKind, head_sizes
from esper.leyline.checks import Check
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
BAD = [
    {"contribution": NAN},
    {"contribution_se": NAN},
    {"contribution_se": 0.7},
    {"incubator_gain": -INF},
    {"gradient_norm": INF},
    {"gradient_ratio": 1e-4},
    {"gradient_ratio": 1e6},
]
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


def complete(op: int, slot: int, gradual: bool, heads: Sequence[int]) -> list[int]:
    """Turn a possible operation into an action, the other heads chosen by any numbers."""
    action = [op, slot, *(n % SIZES[head] for head, n in zip(list(Head)[2:], heads, strict=True))]
    fitting = sorted(FITTING[slot])
    action[Head.BLUEPRINT] = fitting[heads[0] % len(fitting)]
    if op == Op.CULL:
        action[Head.ALPHA_SPEED] = 1 + heads[0] % (len(ALPHA_SPEEDS) - 1) if gradual else 0
    return action


NEXT_OP = {
    Stage.DORMANT: Op.GERMINATE,
    Stage.GERMINATED: Op.ADVANCE,
    Stage.TRAINING: Op.ADVANCE,
    Stage.BLENDING: Op.ADVANCE,
    Stage.PROBATIONARY: Op.FOSSILIZE,
}
"""The step towards a fossil."""
