"""Running statistics of a host that lost a seed: those that the host without it would have had."""

import pytest
import torch

from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, Operator, SiteKind
from esper.leyline.stages import Stage
from esper.tolaria.batches import shared
from esper.tolaria.evaluation import evaluate, measure
from esper.tolaria.harvest import BATCHES, estimate_statistics, harvest
from helpers.population_tools import (
    BLUEPRINTS,
    KINDS,
    Wish,
    bring,
    lanes_of_row,
    make_split,
    populate,
    same_state,
    train_on,
)

IDS = (3, 5, 8, 9)
BLENDED, COMMITTED, INCUBATED, BARE = range(4)
"""Rows by what they hold."""
kinds = pytest.mark.parametrize("kind", KINDS)


def grown(kind, *, updates=120, norm="batch", blueprint=None):
    """A population of one row of each sort, trained on; its trainer."""
    population = populate(kind, IDS, norm=norm)
    trainer = train_on(population, IDS, make_split(kind, 200), batch_size=16, total=updates)
    seed = blueprint or BLUEPRINTS[kind][0]
    wishes = {
        (BLENDED, 0): Wish(seed, Stage.PROBATIONARY),
        (COMMITTED, 0): Wish(seed, Stage.FOSSILIZED),
        (INCUBATED, 0): Wish(seed, Stage.TRAINING),
    }
    bring(population, wishes, trainer)
    trainer.run(updates - trainer.update)
    return population, trainer


def nobody():
    return torch.zeros(len(IDS), dtype=torch.bool)


def estimated_in_full(population, data):
    """Statistics of the whole training split at once."""
    with torch.no_grad():
        for table in population.hosts.buffers:
            table.zero_()
        population.forward(
            shared(data.x, population.rows, population.lane_axis), population.main_pass, statistics=Statistics.UPDATED
        )
        for table in population.hosts.buffers:
            table.mul_(10)


@kinds
def test_the_loss_is_that_of_statistics_estimated_in_full(kind):
    population, trainer = grown(kind, blueprint=Blueprint.ATTENTION)
    # What the seed gives out is large, and in the running means of the layers behind it.
    split = make_split(kind, 300, seed=1)
    for bank in population.seeds.values():
        bank.theta.detach().mul_(3)
    trainer.run(40)
    before = [table.clone() for table in population.hosts.buffers]
    culled_RS = harvest(trainer, nobody())
    assert culled_RS.nonzero().tolist() == [[BLENDED, 0], [INCUBATED, 0]]
    ours_R = evaluate(population, split).loss_R
    for table, old in zip(population.hosts.buffers, before, strict=True):
        table.copy_(old)
    stale_R = evaluate(population, split).loss_R
    estimated_in_full(population, trainer.data)
    true_R = evaluate(population, split).loss_R
    assert abs(float(ours_R[BLENDED] - true_R[BLENDED])) < 0.05
    assert abs(float(stale_R[BLENDED] - true_R[BLENDED])) > 0.1


@kinds
def test_rows_that_lost_nothing_from_the_forward_pass_keep_theirs_bit_for_bit(kind):
    population, trainer = grown(kind)
    before = [lanes_of_row(population, row) for row in range(len(IDS))]
    harvest(trainer, nobody())
    for row in (COMMITTED, BARE):
        same_state(lanes_of_row(population, row), before[row])
    after = [lanes_of_row(population, row) for row in (BLENDED, INCUBATED)]
    for row, state in zip((BLENDED, INCUBATED), after, strict=True):
        # Its seed is gone, and the host has the parameters that it had.
        assert state.keys() < before[row].keys()
        changed = {name for (_, name), tensor in state.items() if not torch.equal(tensor, before[row]["hosts", name])}
        assert all(name.startswith("buffer ") for name in changed)
        assert bool(changed) == (row == BLENDED)


def test_a_row_that_a_rollback_robbed_is_estimated_again():
    population, trainer = grown(SiteKind.VECTOR)
    before = lanes_of_row(population, BARE)
    harvest(trainer, torch.tensor([False, False, False, True]))
    after = lanes_of_row(population, BARE)
    assert any(not torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("updates", [1, 3, BATCHES + 5])
def test_every_minibatch_counts_the_same_however_few_there_were(updates):
    population = populate(SiteKind.VECTOR, IDS, norm="batch", dtype=torch.float64)
    trainer = train_on(population, IDS, make_split(SiteKind.VECTOR, 60, torch.float64), batch_size=8)
    trainer.run(updates)
    seen = min(updates, BATCHES)
    weight = population.hosts.layer.split(population.hosts.theta.detach())[0]
    examples_URBD = trainer.data.x[trainer.order.indices(updates - seen, seen)]
    means = [(examples_RBD @ weight.transpose(1, 2)).mean(1) for examples_RBD in examples_URBD]
    estimate_statistics(trainer, ~nobody())
    torch.testing.assert_close(population.hosts.buffers[0], torch.stack(means).mean(0))


def test_hosts_without_running_statistics_have_none_to_estimate():
    population, trainer = grown(SiteKind.VECTOR, norm="layer")
    before = population.hosts.theta.detach().clone()
    harvest(trainer, nobody())
    assert torch.equal(population.hosts.theta.detach(), before)
    assert not population.base[BLENDED].any()


def test_what_is_left_can_be_measured():
    population, trainer = grown(SiteKind.IMAGE)
    harvest(trainer, nobody())
    measure(population, make_split(SiteKind.IMAGE, 50))
    assert population.slots.contribution.isfinite().nonzero().tolist() == [[COMMITTED, 0]]
    assert population.slots.incubator_gain.isnan().all()


@kinds
@pytest.mark.parametrize("operator", list(Operator))
def test_it_does_not_matter_how_a_seed_was_blended(kind, operator):
    population = populate(kind, IDS[:2], norm="batch")
    trainer = train_on(population, IDS[:2], make_split(kind, 100))
    bring(population, {(0, 1): Wish(BLUEPRINTS[kind][1], Stage.BLENDING, operator, fading=True)}, trainer)
    assert harvest(trainer, torch.zeros(2, dtype=torch.bool)).nonzero().tolist() == [[0, 1]]
    assert not list(population.banks)[1:]
    assert evaluate(population, make_split(kind, 40)).loss_R.isfinite().all()
