"""Keeping rows and bringing them back, without training: what is kept, what is restored, what is silenced."""

import pytest
import torch

from esper.kasmina.rows.core import Statistics
from esper.kasmina.snapshot import Snapshot
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, Op, Operator, SiteKind
from esper.leyline.slots import EMPTY_SLOT
from esper.leyline.stages import Stage
from helpers.growing import (
    EXAMPLES,
    act,
    draw,
    germinate,
    lay_out,
    make_population,
    perform,
    to_blending,
    to_fossilized,
)

ROWS, BACK = 3, 1
CASES = [
    (kind, blueprint, operator)
    for kind in EXAMPLES
    for blueprint in sorted(BLUEPRINTS_OF_KIND[kind])
    if blueprint is not Blueprint.NOOP
    for operator in Operator
]


def back(*rows):
    return torch.isin(torch.arange(ROWS), torch.tensor(rows))


def scrambled(population, seed=0):
    """Every parameter and moment another one."""
    for number, bank in enumerate(population.banks):
        for tensor in (bank.theta, bank.first, bank.second, *bank.buffers):
            tensor.detach().copy_(draw(seed + number, *tensor.shape).abs())
        bank.steps += 3
        bank.birth_N.fill_(number)
        bank.decay *= 0.5


def logits(population):
    examples_RB = draw(7, ROWS, 5, *population.host.example)
    return population.forward(lay_out(population, examples_RB), population.main_pass, statistics=Statistics.RUNNING)[
        0
    ].detach()


@pytest.mark.parametrize(("kind", "blueprint", "operator"), CASES)
def test_a_culled_seed_computes_nothing_before_and_after_it_leaves(kind, blueprint, operator):
    grown, plain = (make_population(kind, ROWS, (6, 6)) for _ in range(2))
    plan = [germinate(0, blueprint, operator), *to_blending(0)]
    perform(grown, dict.fromkeys(range(ROWS), plan))
    scrambled(grown)
    snapshot = Snapshot(grown)
    plain.hosts.theta.detach().copy_(grown.hosts.theta.detach())
    before, alone = logits(grown), logits(plain)
    assert not torch.equal(before[BACK], alone[BACK])
    culled_RS = snapshot.restore(back(BACK))
    assert culled_RS.nonzero().tolist() == [[BACK, 0]]
    for _ in range(2):
        now = logits(grown)
        torch.testing.assert_close(now[BACK], alone[BACK])
        torch.testing.assert_close(now[[0, 2]], before[[0, 2]])
        grown.settle()
    assert all(BACK not in bank.row for bank in (*grown.seeds.values(), *grown.seed_gates.values()))


def test_a_committed_seed_returns_and_a_later_one_does_not():
    population = make_population(SiteKind.VECTOR, ROWS, (6, 6))
    first, second = Blueprint.MLP_SMALL, Blueprint.NORM
    gated = [germinate(0, first, Operator.GATE), *to_fossilized(0)]
    perform(population, dict.fromkeys(range(ROWS), gated))
    scrambled(population)
    snapshot = Snapshot(population)
    good = {name: getattr(population.slots, name).clone() for name in EMPTY_SLOT}
    kept = [(bank.theta.detach().clone(), bank.row.copy()) for bank in population.banks]
    # The lanes of other banks come and go in between.
    perform(population, {BACK: [germinate(1, second, Operator.ADD), *to_fossilized(1)]})
    scrambled(population, 50)
    born = {id(bank): bank.birth_N.clone() for bank in population.banks}
    snapshot.restore(back(BACK))
    population.settle()
    for bank, (theta, row) in zip(population.banks, kept, strict=True):
        assert bank.row.tolist() == row.tolist()
        assert torch.equal(bank.theta[BACK], theta[BACK])
        assert not torch.equal(bank.theta[0], theta[0])
        assert (bank.first[BACK] == 0).all()
        assert (bank.second[BACK] == 0).all()
        assert (bank.steps[BACK], *bank.decay[BACK].tolist()) == (0, 1, 1)
        assert bank.steps[0] > 0
    # When a lane was born stays true: no curve of a learning rate begins again.
    assert all(torch.equal(bank.birth_N, born[id(bank)]) and (bank.birth_N >= 0).all() for bank in population.banks)
    slots = population.slots
    for name, values in good.items():
        torch.testing.assert_close(getattr(slots, name)[BACK, 0], values[BACK, 0], rtol=0, atol=0, equal_nan=True)
    assert slots.stage[BACK, 1] == int(Stage.CULLED)


def test_only_good_rows_are_kept():
    population = make_population(SiteKind.VECTOR, ROWS)
    snapshot = Snapshot(population)
    start = population.hosts.theta.detach().clone()
    scrambled(population)
    later = population.hosts.theta.detach().clone()
    snapshot.take(back(0))
    scrambled(population, 9)
    snapshot.restore(back(0, 1))
    assert torch.equal(population.hosts.theta[0], later[0])
    assert torch.equal(population.hosts.theta[1], start[1])
    assert torch.equal(population.hosts.theta[2], draw(9, *start.shape).abs()[2])


def test_a_row_that_is_returned_again_stays_as_it_was():
    population = make_population(SiteKind.VECTOR, ROWS)
    perform(population, {BACK: [germinate(0, Blueprint.NORM, Operator.ADD), act(Op.ADVANCE, 0)]})
    snapshot = Snapshot(population)
    start = population.hosts.theta.detach().clone()
    assert snapshot.restore(back(BACK)).any()
    population.settle()
    scrambled(population)
    assert not snapshot.restore(back(BACK)).any()
    assert torch.equal(population.hosts.theta[BACK], start[BACK])
    assert population.slots.stage[BACK, 0] == int(Stage.CULLED)
