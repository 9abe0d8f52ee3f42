"""Rows do not touch: what happens in one row changes no bit of another, and a population of E is E populations of 1."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from torch import Tensor

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, Op, Operator, SiteKind
from esper.leyline.slots import EMPTY_SLOT
from esper.leyline.stages import Stage
from esper.tolaria.batches import BatchOrder, shared
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import measure
from esper.tolaria.training import Trainer
from helpers.growing import WAIT, Action, act, germinate
from helpers.population_tools import (
    BLUEPRINTS,
    HOST_NORMS,
    KINDS,
    bring,
    decide,
    lanes_of_row,
    make_split,
    mixed_stages,
    open_gates,
    populate,
    record,
    same_numbers,
    same_state,
    train_on,
)

NAN, INF = float("nan"), float("inf")
OVERFLOW = 1e25  # Its square is infinite in float32.
ROWS = [0, 1, 2, 3]
EXAMPLES = 32
INCUBATORS = ["shadow", "straight-through"]
kinds_and_norms = pytest.mark.parametrize(("kind", "norm"), [(k, n) for k in KINDS for n in HOST_NORMS[k]])


class Spiked(BatchOrder):
    """The order of the rows, one of which meets the example behind the last at chosen updates."""

    row, updates = 0, (1, 3)

    def indices(self, first_update: int, updates: int) -> Tensor:
        chosen = super().indices(first_update, updates).clone()
        for update in self.updates:
            if first_update <= update < first_update + updates:
                chosen[update - first_update, self.row, 2] = EXAMPLES
        return chosen


@dataclass
class Life:
    """Everything that can be seen of a population while it trains."""

    population: Population
    trainer: Trainer
    numbers: list[Tensor] = field(default_factory=list)
    """Tensors [R, ...], in the order in which they were seen."""

    def live(self, held_out: Split) -> None:
        """Five updates and two measurements, with a decision in between."""
        population = self.population
        x = shared(held_out.x, population.rows, population.lane_axis)
        for updates in (3, 2):
            self.numbers.append(self.trainer.run(updates))
            evaluation = measure(population, held_out)
            with torch.no_grad():
                logits, _ = population.forward(x, population.main_pass, statistics=Statistics.RUNNING)
            self.numbers += [evaluation.loss_R, evaluation.accuracy_R, logits]
            self.numbers += [getattr(population.slots, name).clone() for name in EMPTY_SLOT]
            report = population.gate_report(evaluation.loss_R)
            self.numbers += [report.value_CRS.transpose(0, 1), report.passed_CRS.transpose(0, 1).float()]
            decide(population, {})


@cache
def grown(kind: SiteKind, norm: str, incubator: str) -> Population:
    """A population in mixed stages that has trained a little."""
    population = populate(kind, ROWS, incubator=incubator, norm=norm)
    bring(population, mixed_stages(kind), train_on(population, ROWS, make_split(kind, EXAMPLES), total=60))
    return population


def life_of(kind: SiteKind, norm: str, incubator: str, spike: float = 1.0, sick: int = 0) -> Life:
    """Such a population, whose row `sick` is about to meet an example full of `spike`."""
    population = copy.deepcopy(grown(kind, norm, incubator))
    data = make_split(kind, EXAMPLES + 1)
    data.x[EXAMPLES] = spike
    trainer = train_on(population, ROWS, data, total=60)
    trainer.order = Spiked(4, torch.tensor(ROWS), EXAMPLES, 8)
    trainer.order.row = sick
    return Life(population, trainer)


def poison_host(life: Life, row: int, value: float = NAN) -> None:
    with torch.no_grad():
        life.population.hosts.theta[row] = value


def poison_blended_seed(life: Life, row: int) -> None:
    population = life.population
    assert population.slots.stage[row, 0] == int(Stage.BLENDING)
    bank = population.seeds[0, int(population.slots.blueprint[row, 0])]
    assert len(bank) > 1
    with torch.no_grad():
        bank.theta[int(bank.row.searchsorted(row))] = NAN


def poison_gate(life: Life, row: int) -> None:
    gate = life.population.seed_gates[0]
    with torch.no_grad():
        gate.theta[gate.row.tolist().index(row)] = NAN


def poison_buffers(life: Life, row: int) -> None:
    for buffer in life.population.hosts.buffers:
        buffer[row] = NAN


def poison_gradient(life: Life, row: int) -> None:
    record(life.trainer).spoil[0, row] = INF


def same_but_for(sick: int, ours: Life, theirs: Life) -> None:
    """Assert that every other row is bit-equal, and that the sick one is not."""
    others = [row for row in ROWS if row != sick]
    for mine, other in zip(ours.numbers, theirs.numbers, strict=True):
        same_numbers(mine[others], other[others])
    for row in others:
        same_state(lanes_of_row(ours.population, row), lanes_of_row(theirs.population, row))
        for bank in theirs.population.seeds.values():
            assert bank.theta[torch.from_numpy(bank.row == row)].isfinite().all()
    assert not torch.equal(ours.population.hosts.theta[sick], theirs.population.hosts.theta[sick])


@kinds_and_norms
@pytest.mark.parametrize(
    ("poison", "sick", "incubator"),
    [
        (poison_host, 0, "shadow"),
        (poison_host, 3, "straight-through"),
        (poison_blended_seed, 0, "straight-through"),
        (poison_gate, 1, "shadow"),
        (poison_gradient, 2, "shadow"),
    ],
)
def test_a_sick_row_changes_no_bit_of_another(
    kind: SiteKind, norm: str, poison: Callable[[Life, int], None], sick: int, incubator: str
):
    ours, theirs = (life_of(kind, norm, incubator) for _ in range(2))
    poison(theirs, sick)
    held_out = make_split(kind, 20, seed=1)
    for life in (ours, theirs):
        life.live(held_out)
    same_but_for(sick, ours, theirs)
    if poison is not poison_gradient:
        assert theirs.numbers[0].isnan().tolist() == [row == sick for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("incubator", INCUBATORS)
def test_a_sick_row_of_batch_statistics(kind: SiteKind, incubator: str):
    ours, theirs = (life_of(kind, "batch", incubator) for _ in range(2))
    poison_buffers(theirs, 1)
    held_out = make_split(kind, 20, seed=1)
    for life in (ours, theirs):
        life.live(held_out)
    others = [0, 2, 3]
    for mine, other in zip(ours.numbers, theirs.numbers, strict=True):
        same_numbers(mine[others], other[others])
    for row in others:
        same_state(lanes_of_row(ours.population, row), lanes_of_row(theirs.population, row))
    # It trains on its batches, and is NaN where it is evaluated.
    assert theirs.numbers[0].isfinite().all()
    assert theirs.numbers[1].isnan().tolist() == [False, True, False, False]


@kinds_and_norms
@pytest.mark.parametrize(
    ("spike", "sick", "incubator"),
    [(NAN, 0, "shadow"), (INF, 2, "straight-through"), (OVERFLOW, 1, "shadow")],
    ids=["nan", "inf", "overflow"],
)
def test_a_sick_batch_stays_in_its_row(kind: SiteKind, norm: str, spike: float, sick: int, incubator: str):
    ours = life_of(kind, norm, incubator, sick=sick)
    theirs = life_of(kind, norm, incubator, spike, sick)
    steps = theirs.population.hosts.steps.clone()
    held_out = make_split(kind, 20, seed=1)
    for life in (ours, theirs):
        life.live(held_out)
    same_but_for(sick, ours, theirs)
    # Nothing of it is left in the parameters: updates whose gradient is not finite are not made.
    assert theirs.population.hosts.theta.isfinite().all()
    made = (theirs.population.hosts.steps - steps).tolist()
    if spike != OVERFLOW:
        assert made == [3.0 if row == sick else 5.0 for row in ROWS]


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_leaves_a_row_as_it_was(kind: SiteKind):
    life = life_of(kind, "none", "shadow")
    poison_gradient(life, 2)
    before = life.population.hosts
    kept = [getattr(before, name)[2].detach().clone() for name in ("theta", "first", "second", "steps")]
    life.trainer.run(4)
    after = life.population.hosts
    for name, value in zip(("theta", "first", "second", "steps"), kept, strict=True):
        assert torch.equal(getattr(after, name)[2], value)
    assert not torch.equal(after.theta[1], kept[0])


IDS = [3, 0, 7, 1, 12]
DECISIONS = 22
CONTROL = 4


def script(kind: SiteKind) -> list[dict[int, Action]]:
    """Row 4 never grows; the others germinate, blend, retarget, commit, fade and cull, each at its own time."""
    first, second, third = BLUEPRINTS[kind]
    add, multiply, gate = Operator.ADD, Operator.MULTIPLY, Operator.GATE
    faster = {"tempo": 0, "alpha_target": 2}

    def sow(slot: int, blueprint: Blueprint, operator: Operator) -> Action:
        action = germinate(slot, blueprint, operator)
        assert action[4] == faster["tempo"]
        return action

    on = [act(Op.ADVANCE, slot) for slot in (0, 1)]
    commit = [act(Op.FOSSILIZE, slot) for slot in (0, 1)]
    cull = [act(Op.CULL, slot) for slot in (0, 1)]
    fade = [act(Op.CULL, slot, alpha_speed=1, alpha_curve=1) for slot in (0, 1)]
    half = act(Op.SET_ALPHA_TARGET, 0, alpha_target=0, alpha_speed=1, alpha_curve=3)
    full_at_once = act(Op.SET_ALPHA_TARGET, 0, alpha_target=2, alpha_speed=0)
    w = WAIT
    rows = {
        # Both sites grow and are committed.
        0: [sow(0, first, gate), on[0], sow(1, second, multiply), on[0], on[1], w, on[0], on[1], commit[0], w, on[1]],
        # Culled in the incubator, and again when blended, the slot used again after its embargo.
        1: [w, sow(0, first, add), on[0], w, cull[0], sow(1, third, gate), on[1], on[1], w, sow(0, second, add)],
        # Faded out while another learns.
        2: [sow(1, second, gate), on[1], sow(0, first, multiply), on[1], on[0], w, w, fade[1], on[0], w, w, on[0]],
        # A new target, at a pace and at once.
        3: [w, w, sow(0, third, gate), on[0], w, on[0], w, w, on[0], half, w, w, full_at_once, on[0], commit[0]],
    }
    rows[0] += [commit[1]]
    rows[1] += [on[0], w, on[0], cull[1], w, w, on[0], commit[0]]
    rows[2] += [commit[0], w, w, sow(1, first, add), on[1], w, on[1]]
    return [{row: plan[d] for row, plan in rows.items() if d < len(plan)} for d in range(DECISIONS)]


def one_decision(population: Population, wanted: dict[int, Action]) -> Tensor:
    actions = torch.tensor([wanted.get(row, WAIT) for row in range(population.rows)])
    return population.decide(actions, open_gates(population))[0].accepted


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("incubator", INCUBATORS)
@pytest.mark.parametrize(("kind", "norm"), [(k, n) for k in KINDS for n in ("none", "batch")])
def test_a_population_of_e_is_e_populations_of_one(kind: SiteKind, norm: str, incubator: str):
    data, held_out = make_split(kind, 40, torch.float64), make_split(kind, 16, torch.float64, seed=1)
    together = populate(kind, IDS, incubator=incubator, norm=norm, dtype=torch.float64)
    single = [populate(kind, [i], incubator=incubator, norm=norm, dtype=torch.float64) for i in IDS]
    populations = [together, *single]
    trainers = [
        train_on(p, ids, data, total=DECISIONS, learning_rate=0.03)
        for p, ids in zip(populations, [IDS, *([i] for i in IDS)], strict=True)
    ]
    stages: set[int] = set()
    for wanted in script(kind):
        for row, population in enumerate(single):
            alone = one_decision(population, {0: wanted[row]} if row in wanted else {})
            assert alone.all(), (row, wanted)
        assert one_decision(together, wanted).all()
        losses = [trainer.run(1) for trainer in trainers]
        close(losses[0], torch.cat(losses[1:]))
        evaluations = [measure(p, held_out) for p in populations]
        close(evaluations[0].loss_R, torch.cat([e.loss_R for e in evaluations[1:]]))
        for name in EMPTY_SLOT:
            ours = getattr(together.slots, name)
            theirs = torch.cat([getattr(p.slots, name) for p in single])
            # Measurements are kept in float32.
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, equal_nan=True)
        stages |= set(together.slots.stage.flatten().tolist())
    assert stages == {int(stage) for stage in Stage} - {int(Stage.UNKNOWN)}

    x = held_out.x
    with torch.no_grad():
        logits, *alone = (
            p.forward(shared(x, p.rows, p.lane_axis), p.main_pass, statistics=Statistics.RUNNING)[0]
            for p in populations
        )
    close(logits, torch.cat(alone))
    for row, population in enumerate(single):
        ours, theirs = lanes_of_row(together, row), lanes_of_row(population, 0)
        assert ours.keys() == theirs.keys()
        assert len(ours) > 6 or row == CONTROL
        for key, tensor in ours.items():
            close(tensor, theirs[key])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_one_id_are_twins_until_they_grow_apart(kind: SiteKind):
    """The same initialisation, the same data order and the same actions: the same numbers."""
    ids = [5, 2, 5]
    population = populate(kind, ids, norm="batch", dtype=torch.float64)
    trainer = train_on(population, ids, make_split(kind, EXAMPLES, torch.float64))
    first, second, _ = BLUEPRINTS[kind]
    for blueprint, slot in ((first, 0), (second, 1)):
        for action in (germinate(slot, blueprint, Operator.GATE), act(Op.ADVANCE, slot), act(Op.ADVANCE, slot), WAIT):
            decide(population, {0: action, 2: action})
            loss_R = trainer.run(1)
            # Up to rounding, which may depend on where a row lies.
            close(loss_R[0], loss_R[2])
            assert (loss_R[0] - loss_R[1]).abs() > 1e-6
    ours, theirs = lanes_of_row(population, 0), lanes_of_row(population, 2)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        close(tensor, theirs[key])
    decide(population, {2: act(Op.CULL, 0)})
    trainer.run(2)
    assert (population.hosts.theta[0] - population.hosts.theta[2]).abs().max() > 1e-6
