"""A population under arbitrary actions with real training in between: what must hold after every decision."""

import copy
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import Tensor

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import ALPHA_SPEEDS, TEMPOS, Head, Op, SiteKind, head_sizes
from esper.leyline.checks import Check, GateReport, Outcome
from esper.leyline.config import OptimizerConfig
from esper.leyline.slots import AlphaMode, SlotTensors, legal_ops
from esper.leyline.stages import BLENDED_STAGES, GROWTH_ORDER, WAITING_STAGES, Stage
from esper.tolaria.batches import BatchOrder, shared
from esper.tolaria.evaluation import measure
from esper.tolaria.training import Trainer
from helpers.growing import GOOD
from helpers.population_tools import (
    BLUEPRINTS,
    HOSTS,
    LANE_STATE,
    audit,
    banks_by_key,
    learning_lanes,
    make_split,
    populate,
)

EMBARGO = 3
UPDATES = 2
IMMEDIATE = ALPHA_SPEEDS.index(0)
FOSSIL_FIELDS = ("stage", "blueprint", "operator", "seed_id", "alpha", "alpha_target", "parameters")
# Ramps of 8 decisions are rarely seen to their end in so short a life.
SHORT = {Head.TEMPO: 1, Head.ALPHA_SPEED: 2}
HEADS = [head for head in Head if head not in (Head.OP, Head.SLOT)]

Place = tuple[int, int]


class Growth(RuleBasedStateMachine):
    """Any actions on a few rows; subclasses say on which."""

    kind: SiteKind
    rows: int
    widths: tuple[int, ...]
    host: dict[str, object]
    seen: Counter[str]

    @initialize(incubator=st.sampled_from(["shadow", "straight-through"]), ids=st.permutations(range(3)))
    def start(self, incubator: str, ids: list[int]) -> None:
        ids = ids[: self.rows]
        self.population = populate(
            self.kind, ids, self.widths, incubator=incubator, embargo=EMBARGO, dtype=torch.float32, **self.host
        )
        data = make_split(self.kind, 24)
        self.split = make_split(self.kind, 12, seed=1)
        order = BatchOrder(1, torch.tensor(ids), len(data.y), 6)
        self.trainer = Trainer(self.population, data, order, OptimizerConfig(learning_rate=0.02), 400)
        self.x = shared(self.split.x, self.rows, self.population.lane_axis)
        self.loss_R = torch.full((self.rows,), float("nan"))
        self.decision = 0
        self.sizes = head_sizes(self.population.slots.slots)
        self.tempo: dict[Place, int] = {}
        self.ramp: dict[Place, tuple[int, int]] = {}
        self.fossils: dict[Place, dict[str, float]] = {}
        self.waited: dict[Place, list[Stage]] = {}

    # What is asked.

    @rule(wild=st.lists(st.lists(st.integers(-1, 13), min_size=8, max_size=8), min_size=3, max_size=3))
    def ask_anything(self, wild: list[list[int]]) -> None:
        sizes = [self.sizes[head] for head in Head]
        # Of three numbers that name no choice of a head two are folded back, so that not all is refused.
        actions = [[n % size if n >= size and n % 3 else n for n, size in zip(row, sizes, strict=True)] for row in wild]
        self._decide(actions[: self.rows])

    @rule(
        picks=st.lists(st.integers(0, 10**6), min_size=3, max_size=3),
        heads=st.lists(st.lists(st.integers(0, 10**6), min_size=6, max_size=6), min_size=3, max_size=3),
    )
    def ask_what_is_legal(self, picks: list[int], heads: list[list[int]]) -> None:
        legal_ROS = legal_ops(self.population.slots, self.population.fits_SB)
        actions = []
        for row, pick in enumerate(picks[: self.rows]):
            choices = legal_ROS[row].nonzero().tolist()
            op, slot = choices[pick % len(choices)]
            actions.append([op, slot, *self._choices(heads[row])])
        self._decide(actions)

    @rule(
        first=st.integers(0, 2),
        times=st.integers(1, 3),
        heads=st.lists(st.lists(st.integers(0, 10**6), min_size=6, max_size=6), min_size=3, max_size=3),
    )
    def push_on(self, first: int, times: int, heads: list[list[int]]) -> None:
        for _ in range(times):
            self._push(first, heads)

    def _push(self, first: int, heads: list[list[int]]) -> None:
        slots = self.population.slots
        for name, value in GOOD.items():
            getattr(slots, name).masked_fill_(slots.seed_id >= 0, value)
        legal_ROS = legal_ops(slots, self.population.fits_SB)
        actions = []
        for row in range(self.rows):
            wishes = [
                (op, slot % slots.slots)
                for slot in range(first, first + slots.slots)
                for op in (Op.FOSSILIZE, Op.ADVANCE, Op.GERMINATE)
                if legal_ROS[row, op, slot % slots.slots]
                and not (op is Op.ADVANCE and slots.alpha_mode[row, slot % slots.slots] != AlphaMode.HOLD)
            ]
            op, slot = wishes[0] if wishes else (Op.WAIT, 0)
            actions.append([int(op), slot, *self._choices(heads[row])])
        self._decide(actions)

    @rule(
        row=st.integers(0, 2),
        turn=st.integers(0, 2),
        op=st.sampled_from([Op.CULL, Op.SET_ALPHA_TARGET]),
        heads=st.tuples(st.integers(0, 2), st.integers(0, 1), st.integers(0, 4)),
    )
    def touch_one(self, row: int, turn: int, op: Op, heads: tuple[int, int, int]) -> None:
        """Cull or retarget a seed where that is possible; the other rows wait."""
        row %= self.rows
        slots = legal_ops(self.population.slots, self.population.fits_SB)[row, int(op)].nonzero().flatten().tolist()
        actions = [[0] * len(Head) for _ in range(self.rows)]
        if slots:
            actions[row] = [int(op), slots[turn % len(slots)], 0, 0, 0, *heads]
        self._decide(actions)

    def _choices(self, numbers: list[int]) -> list[int]:
        """Choices of the heads behind the slot, the blueprint one of a few that fit."""
        blueprints = BLUEPRINTS[self.kind]
        choices = {head: n % SHORT.get(head, self.sizes[head]) for head, n in zip(HEADS, numbers, strict=True)} | {
            Head.BLUEPRINT: int(blueprints[numbers[0] % len(blueprints)])
        }
        return [choices[head] for head in HEADS]

    # What must hold.

    def _decide(self, actions: list[list[int]]) -> None:
        population = self.population
        action_RH = torch.tensor(actions)
        gates = population.gate_report(self.loss_R)
        before = population.slots.clone()
        idle = copy.deepcopy(population)
        logits = self._logits(population)
        banks = _copies(population)
        outcome, _ = population.decide(action_RH, gates)
        self.decision += 1

        audit(population)
        self._optimizer_owns_what_learns()
        _survivors_keep_everything(banks, _copies(population), before, population.slots)
        self._outputs(action_RH, outcome, gates, idle, logits, before)
        self._alphas(action_RH, outcome, before)
        self._waiting_rooms()
        self._fossils()
        self._train()
        self._fossils()

    def _optimizer_owns_what_learns(self) -> None:
        population = self.population
        slots = population.slots
        visible = (slots.alpha > 0) & torch.isin(slots.stage, torch.tensor([int(s) for s in BLENDED_STAGES]))
        learns = (slots.stage == int(Stage.TRAINING)) | visible & ~slots.fading_RS()
        expected: dict[object, list[int]] = {HOSTS: list(range(self.rows))}
        for row, site in learns.nonzero().tolist():
            expected.setdefault((site, int(slots.blueprint[row, site])), []).append(row)
            if ("gate", site) in banks_by_key(population) and row in population.seed_gates[site].row:
                expected.setdefault(("gate", site), []).append(row)
        assert learning_lanes(population) == expected

    def _outputs(
        self,
        action_RH: Tensor,
        outcome: Outcome,
        gates: GateReport,
        idle: Population,
        logits: Tensor,
        before: SlotTensors,
    ) -> None:
        """A germination changes no output; a cull leaves the network without the seed. Bit for bit.

        `idle` is what the population was: it waits where a germination or an immediate cull was accepted, so that
        everything else happens to it too.
        """
        op = action_RH[:, Head.OP]
        culled = outcome.accepted & (op == Op.CULL) & (action_RH[:, Head.ALPHA_SPEED] == IMMEDIATE)
        germinated = outcome.accepted & (op == Op.GERMINATE)
        if not (culled | germinated).any():
            return
        waits = torch.where((culled | germinated)[:, None], 0, action_RH)
        idle.decide(waits, gates)
        enabled = idle.base.copy()
        for row in culled.nonzero().flatten().tolist():
            site = int(action_RH[row, Head.SLOT])
            self.seen["cull of a blended seed"] += bool(enabled[row, site])
            enabled[row, site] = False
        without, _ = idle.forward(self.x, idle.planner.main(enabled), statistics=Statistics.RUNNING)
        after = self._logits(self.population)
        assert torch.equal(after, without)

        if not culled.any() and torch.equal(before.alpha, self.population.slots.alpha):
            self.seen["germination alone"] += 1
            assert torch.equal(after, logits)

    def _alphas(self, action_RH: Tensor, outcome: Outcome, before: SlotTensors) -> None:
        after = self.population.slots
        begun: dict[int, tuple[int, int]] = {}
        for row in range(self.rows):
            op, site = int(action_RH[row, Head.OP]), int(action_RH[row, Head.SLOT])
            if not outcome.accepted[row] or op == Op.WAIT:
                continue
            self.seen[f"accepted {Op(op).name}"] += 1
            if op == Op.GERMINATE:
                self.tempo[row, site] = TEMPOS[int(action_RH[row, Head.TEMPO])]
            if op == Op.ADVANCE and outcome.after[row] == int(Stage.BLENDING):
                begun[row] = (site, self.tempo[row, site])
            elif op in (Op.SET_ALPHA_TARGET, Op.CULL):
                begun[row] = (site, ALPHA_SPEEDS[int(action_RH[row, Head.ALPHA_SPEED])])
        for row, (site, length) in begun.items():
            self.ramp[row, site] = (self.decision, length)

        blended = [int(stage) for stage in BLENDED_STAGES]
        for row, site in np.ndindex(*after.stage.shape):
            place = (row, site)
            old, new = float(before.alpha[place]), float(after.alpha[place])
            target, mode, stage = float(after.alpha_target[place]), int(after.alpha_mode[place]), after.stage[place]
            survived = before.seed_id[place] == after.seed_id[place] and after.seed_id[place] >= 0
            if not survived:
                if place in self.ramp and before.fading_RS()[place] and before.alpha_mode[place] != AlphaMode.HOLD:
                    began, length = self.ramp[place]
                    culled = action_RH[row, Head.OP] == Op.CULL and action_RH[row, Head.SLOT] == site
                    if not (culled and outcome.accepted[row]):
                        # It left by itself, when its fade was over and not before.
                        assert self.decision - began + 1 == length
                        self.seen["fade ended"] += 1
                self.ramp.pop(place, None)
                assert new == 0
                continue
            if stage not in blended:
                assert new == 0
                assert mode == AlphaMode.HOLD
                continue
            assert new > 0
            if mode == AlphaMode.HOLD:
                assert new == target
                if before.alpha_mode[place] != AlphaMode.HOLD:
                    began, length = self.ramp.pop(place)
                    assert self.decision - began + 1 == length
                    self.seen["ramp landed"] += 1
                    assert (
                        min(float(before.alpha_start[place]), target)
                        <= old
                        <= max(float(before.alpha_start[place]), target)
                    )
            elif mode == AlphaMode.UP:
                assert old <= new < target
            else:
                assert old >= new > target
            # Where a ramp goes on, nothing but the clock has touched it.
            if before.alpha_mode[place] != AlphaMode.HOLD:
                assert target == before.alpha_target[place]
                assert mode in (before.alpha_mode[place], AlphaMode.HOLD)

    def _waiting_rooms(self) -> None:
        """The way back from CULLED to DORMANT takes 1, `EMBARGO` and 1 observed decisions."""
        way = [Stage.CULLED, *[Stage.EMBARGOED] * EMBARGO, Stage.RESETTING]
        slots = self.population.slots
        for row, site in np.ndindex(*slots.stage.shape):
            stage = Stage(int(slots.stage[row, site]))
            if stage in WAITING_STAGES:
                observed = self.waited.setdefault((row, site), [])
                observed.append(stage)
                assert observed == way[: len(observed)]
            elif (row, site) in self.waited:
                assert self.waited.pop((row, site)) == way
                assert stage is Stage.DORMANT
                self.seen["embargo over"] += 1

    def _fossils(self) -> None:
        slots = self.population.slots
        for row, site in (slots.stage == int(Stage.FOSSILIZED)).nonzero().tolist():
            now = {name: getattr(slots, name)[row, site].item() for name in FOSSIL_FIELDS}
            then = self.fossils.setdefault((row, site), now)
            assert now == then
            self.seen["fossil kept"] += then is not now
        for row, site in self.fossils:
            assert slots.stage[row, site] == int(Stage.FOSSILIZED)

    def _train(self) -> None:
        population = self.population
        stages = population.slots.stage.clone()
        frozen = population.slots.fading_RS() | (stages == int(Stage.GERMINATED))
        before = _copies(population)
        loss_R = self.trainer.run(UPDATES)
        after = _copies(population)
        assert loss_R.isfinite().all()
        for (key, row, seed_id), state in after.items():
            then = before[key, row, seed_id]
            site = None if key == HOSTS else key[1] if key[0] == "gate" else key[0]
            if site is not None and frozen[row, site]:
                self.seen["fading seed frozen"] += bool(population.slots.fading_RS()[row, site])
                assert all(torch.equal(state[name], then[name]) for name in LANE_STATE)
            else:
                assert state["steps"] == then["steps"] + UPDATES
        assert torch.equal(population.slots.stage, stages)
        evaluation = measure(population, self.split)
        self.loss_R = evaluation.loss_R
        audit(population)
        for stage in {Stage(int(s)) for s in stages.flatten()}:
            self.seen[stage.name] += 1

    def _logits(self, population: Population) -> Tensor:
        with torch.no_grad():
            logits, _ = population.forward(self.x, population.main_pass, statistics=Statistics.RUNNING)
        return logits


def _copies(population: Population) -> dict[tuple[object, int, int], dict[str, Tensor]]:
    """State of every lane by bank, row and seed id."""
    return {
        (key, int(bank.row[lane]), int(bank.seed_id[lane])): {
            name: getattr(bank, name)[lane].detach().clone() for name in LANE_STATE
        }
        for key, bank in banks_by_key(population).items()
        for lane in range(len(bank))
    }


def _survivors_keep_everything(
    before: dict[tuple[object, int, int], dict[str, Tensor]],
    after: dict[tuple[object, int, int], dict[str, Tensor]],
    old: SlotTensors,
    new: SlotTensors,
) -> None:
    """A decision moves lanes and never changes them; a newcomer has learned nothing yet."""
    for lane, state in after.items():
        if lane in before:
            assert all(torch.equal(state[name], before[lane][name]) for name in LANE_STATE)
        else:
            _, row, seed_id = lane
            assert seed_id == old.seeds_made[row]
            assert not any(state[name].any() for name in ("first", "second", "steps"))
            assert (state["decay"] == 1).all()
    assert torch.equal(new.seeds_made >= old.seeds_made, torch.ones_like(new.seeds_made, dtype=torch.bool))


MUST_SEE = {
    *(stage.name for stage in GROWTH_ORDER),
    *(stage.name for stage in WAITING_STAGES),
    *(f"accepted {op.name}" for op in Op if op is not Op.WAIT),
    *("cull of a blended seed", "germination alone", "ramp landed", "fade ended"),
    *("embargo over", "fossil kept", "fading seed frozen"),
}
"""What a long life must have come by, so that every check above was asked."""


hosts = pytest.mark.parametrize(
    ("kind", "rows", "widths", "host"),
    [
        (SiteKind.VECTOR, 3, (5, 4), {"norm": "batch"}),
        (SiteKind.IMAGE, 2, (4, 4, 4), {"pooling": "average"}),
    ],
    ids=["vector", "image"],
)


def machine_of(kind: SiteKind, rows: int, widths: tuple[int, ...], host: dict[str, object]) -> type[Growth]:
    return type("Growth", (Growth,), {"kind": kind, "rows": rows, "widths": widths, "host": host, "seen": Counter()})


@hosts
def test_any_actions(kind: SiteKind, rows: int, widths: tuple[int, ...], host: dict[str, object]):
    # Shrinking a failure would train for minutes.
    phases = [Phase.explicit, Phase.generate]
    limits = settings(max_examples=12, stateful_step_count=25, derandomize=True, deadline=None, phases=phases)
    run_state_machine_as_test(machine_of(kind, rows, widths, host), settings=limits)


@hosts
def test_a_long_life_meets_everything(kind: SiteKind, rows: int, widths: tuple[int, ...], host: dict[str, object]):
    machine = machine_of(kind, rows, widths, host)
    dice = random.Random(kind)

    def numbers(count: int) -> list[int]:
        return [dice.randrange(10**6) for _ in range(count)]

    for incubator in ["shadow", "straight-through"] * 4:
        life = machine()
        life.start(incubator, dice.sample(range(3), 3))
        for _ in range(25):
            turn = dice.random()
            if turn < 0.5:
                life.push_on(dice.randrange(3), 1, [numbers(6) for _ in range(3)])
            elif turn < 0.6:
                life.ask_what_is_legal(numbers(3), [numbers(6) for _ in range(3)])
            elif turn < 0.65:
                life.ask_anything([[dice.randint(-1, 13) for _ in Head] for _ in range(3)])
            else:
                op = Op.CULL if turn < 0.8 else Op.SET_ALPHA_TARGET
                heads = (dice.randrange(3), dice.randrange(2), dice.randrange(5))
                life.touch_one(dice.randrange(3), dice.randrange(3), op, heads)
    assert machine.seen.keys() >= MUST_SEE, MUST_SEE - machine.seen.keys()


def test_a_refused_action_names_a_check_and_changes_nothing():
    population = populate(SiteKind.VECTOR, [0, 1], (5, 4))
    before = population.slots.clone()
    logits, _ = population.forward(torch.ones(2, 3, 7), population.main_pass, statistics=Statistics.RUNNING)
    actions = torch.tensor([[int(Op.ADVANCE), *[0] * 7], [int(Op.CULL), *[0] * 7]])
    outcome, _ = population.decide(actions, population.gate_report(torch.ones(2)))
    assert outcome.refused_by.tolist() == [Check.STAGE, Check.STAGE]
    assert torch.equal(population.slots.stage, before.stage)
    again, _ = population.forward(torch.ones(2, 3, 7), population.main_pass, statistics=Statistics.RUNNING)
    assert torch.equal(again, logits)
    audit(population)
