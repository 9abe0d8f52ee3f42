"""Evaluation beside plain networks: each row as its export, each seed by a network without it."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esper.kasmina.export import export_row
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, Op, SiteKind
from esper.leyline.stages import Stage
from esper.tolaria.batches import shared
from esper.tolaria.datasets import Split
from esper.tolaria.door import IGNORED
from esper.tolaria.evaluation import CHUNK, coalition_losses, evaluate, measure
from helpers.growing import act
from helpers.population_tools import (
    BLUEPRINTS,
    KINDS,
    Wish,
    bring,
    decide,
    lanes_of_row,
    make_split,
    mixed_stages,
    network_with,
    populate,
    same_numbers,
    same_state,
    train_on,
)

ROWS = [0, 1, 2, 3]
WORTH = ("contribution", "contribution_se", "incubator_gain", "incubator_gain_se")
kinds = pytest.mark.parametrize("kind", KINDS)
norms = pytest.mark.parametrize("norm", ["none", "batch"])


def trained(kind: SiteKind, norm: str = "batch", dtype: torch.dtype = torch.float64) -> Population:
    """Mixed stages, trained until every seed says something."""
    population = populate(kind, ROWS, norm=norm, dtype=dtype)
    data = make_split(kind, 48, dtype)
    trainer = train_on(population, ROWS, data, total=200, learning_rate=0.03)
    wishes = mixed_stages(kind)
    early = {place: wish._replace(fading=False) for place, wish in wishes.items()}
    bring(population, early, trainer)
    trainer.run(10)
    bring(population, wishes)
    return population


def losses_of(population: Population, row: int, enabled: list[bool], split: Split) -> Tensor:
    """Loss of each example in a plain network of the host and these seeds, with the statistics of its own batches."""
    network = network_with(population, row, enabled).train()
    chunks = -(-len(split.y) // CHUNK)
    with torch.no_grad():
        logits = torch.cat([network(x) for x in split.x.tensor_split(chunks)])
    return cross_entropy(logits, split.y, reduction="none")


def close(ours: Tensor, theirs: Tensor | float) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs, dtype=ours.dtype), rtol=1e-9, atol=1e-10)


@kinds
@norms
@pytest.mark.parametrize("examples", [1, CHUNK, CHUNK + 13])
def test_a_row_is_evaluated_as_its_export(kind: SiteKind, norm: str, examples: int):
    population = trained(kind, norm)
    split = make_split(kind, examples, torch.float64, seed=5)
    evaluation = evaluate(population, split)
    assert evaluation.loss_R.shape == evaluation.accuracy_R.shape == (4,)
    for row in ROWS:
        with torch.no_grad():
            logits = export_row(population, row)(split.x)
        close(evaluation.loss_R[row], cross_entropy(logits, split.y))
        close(evaluation.accuracy_R[row], (logits.argmax(1) == split.y).double().mean())
    assert len(set(evaluation.loss_R.tolist())) == 4


@kinds
def test_evaluation_changes_nothing(kind: SiteKind):
    population = trained(kind)
    before = [lanes_of_row(population, row) for row in ROWS]
    slots = population.slots.clone()
    split = make_split(kind, 30, torch.float64)
    evaluate(population, split)
    measure(population, split)
    coalition_losses(population, split, np.array([0, 1]), np.array([[False, False], [True, True]]))
    for row in ROWS:
        same_state(lanes_of_row(population, row), before[row])
    for name, value in vars(slots).items():
        if name not in WORTH:
            same_numbers(getattr(population.slots, name), value)


@kinds
@norms
def test_what_each_seed_is_worth(kind: SiteKind, norm: str):
    population = trained(kind, norm)
    split = make_split(kind, CHUNK + 22, torch.float64, seed=5)
    evaluation = measure(population, split)
    plain = evaluate(population, split)
    assert torch.equal(evaluation.loss_R, plain.loss_R)
    assert torch.equal(evaluation.accuracy_R, plain.accuracy_R)
    slots = population.slots
    seen = 0
    for row, site in itertools.product(ROWS, range(2)):
        base = population.base[row].tolist()
        other = [on != (s == site) for s, on in enumerate(base)]
        here, there = (losses_of(population, row, enabled, split) for enabled in (base, other))
        incubated = slots.stage[row, site] == int(Stage.TRAINING)
        # Less loss with the seed is worth more, for both.
        worth = (here - there if incubated else there - here).numpy()
        value = slots.incubator_gain if incubated else slots.contribution
        error = slots.incubator_gain_se if incubated else slots.contribution_se
        assert value[row, site].item() == pytest.approx(worth.mean(), rel=1e-5, abs=1e-8)
        assert error[row, site].item() == pytest.approx(worth.std(ddof=1) / len(worth) ** 0.5, rel=1e-5)
        unmeasured = (slots.contribution, slots.contribution_se) if incubated else (slots.incubator_gain,)
        assert all(t[row, site].isnan() for t in unmeasured)
        seen += abs(worth.mean()) > 1e-4
    assert seen >= 6


@kinds
def test_what_is_not_there_is_not_measured(kind: SiteKind):
    population = populate(kind, ROWS)
    split = make_split(kind, 20)
    first, second, _ = BLUEPRINTS[kind]
    bring(
        population,
        {
            (0, 0): Wish(first, Stage.GERMINATED),
            (1, 0): Wish(first, Stage.TRAINING),
            (2, 1): Wish(second, Stage.BLENDING),
        },
    )
    slots = population.slots
    for name in WORTH:
        getattr(slots, name).fill_(5.0)
    measure(population, split)
    assert slots.contribution.isfinite().nonzero().tolist() == [[2, 1]]
    assert slots.contribution_se.isfinite().nonzero().tolist() == [[2, 1]]
    assert slots.incubator_gain.isfinite().nonzero().tolist() == [[1, 0]]
    assert slots.incubator_gain_se.isfinite().nonzero().tolist() == [[1, 0]]
    decide(population, {1: act(Op.CULL, 0), 2: act(Op.CULL, 1)})
    measure(population, split)
    assert all(getattr(slots, name).isnan().all() for name in WORTH)


class Lanes:
    """Counts the lanes of every branch pass."""

    def __init__(self, population: Population, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        branch = population.branch

        def counting(streams, branches):
            self.counts.append(branches.steps.lanes)
            return branch(streams, branches)

        monkeypatch.setattr(population, "branch", counting)


@kinds
@norms
def test_coalitions_are_those_of_plain_networks(kind: SiteKind, norm: str):
    population = trained(kind, norm)
    split = make_split(kind, CHUNK + 9, torch.float64, seed=5)
    requests = [(row, enabled) for enabled in itertools.product([True, False], repeat=2) for row in ROWS[::-1]]
    row = np.array([r for r, _ in requests])
    enabled = np.array([e for _, e in requests])
    losses = coalition_losses(population, split, row, enabled)
    for (r, wanted), loss in zip(requests, losses, strict=True):
        close(loss, losses_of(population, r, list(wanted), split).mean())
    assert len({round(loss, 9) for loss in losses.tolist()}) == len(requests)


@kinds
def test_a_distinct_coalition_is_computed_once(kind: SiteKind, monkeypatch: pytest.MonkeyPatch):
    population = trained(kind)
    lanes = Lanes(population, monkeypatch)
    split = make_split(kind, 40, torch.float64)
    base = population.base
    asked = [(2, base[2]), (2, [False, True]), (0, base[0]), (2, [False, True]), (0, [True, True]), (2, [False, False])]
    asked += [(2, base[2]), (0, [True, True]), (3, [True, True]), (3, base[3])]
    row, enabled = np.array([r for r, _ in asked]), np.array([list(e) for _, e in asked])
    losses = coalition_losses(population, split, row, enabled)
    # Rows 2 (twice), 0 and 3; a row as it is comes with the main pass.
    assert lanes.counts == [4]
    assert torch.equal(losses[[1, 0, 4]], losses[[3, 6, 7]])
    for (r, wanted), loss in zip(asked, losses, strict=True):
        close(loss, losses_of(population, r, list(wanted), split).mean())


@kinds
def test_rows_as_they_are_need_no_branch(kind: SiteKind, monkeypatch: pytest.MonkeyPatch):
    population = trained(kind)
    lanes = Lanes(population, monkeypatch)
    split = make_split(kind, 20, torch.float64)
    row = np.array([3, 1, 3])
    losses = coalition_losses(population, split, row, population.base[row])
    for r, loss in zip(row.tolist(), losses, strict=True):
        close(loss, losses_of(population, r, population.base[r].tolist(), split).mean())
    none = coalition_losses(population, split, row[:0], population.base[row[:0]])
    assert none.shape == (0,)
    assert lanes.counts == []


@kinds
def test_leave_one_out_is_a_coalition(kind: SiteKind):
    population = trained(kind)
    split = make_split(kind, 60, torch.float64, seed=2)
    measure(population, split)
    row, site = population.base.nonzero()
    without = population.base[row].copy()
    without[np.arange(len(row)), site] = False
    gained = coalition_losses(population, split, row, without) - coalition_losses(
        population, split, row, population.base[row]
    )
    torch.testing.assert_close(population.slots.contribution[row, site], gained.float(), rtol=1e-5, atol=1e-7)


@kinds
@norms
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_sick_row_is_measured_alone(kind: SiteKind, norm: str, poison: float):
    population = trained(kind, norm)
    split = make_split(kind, 30, torch.float64, seed=5)
    every = np.ones((4, 2), dtype=bool)
    rows = np.array(ROWS)
    healthy = [measure(population, split).loss_R, evaluate(population, split).accuracy_R]
    healthy += [coalition_losses(population, split, rows, every)]
    healthy += [getattr(population.slots, name).clone() for name in WORTH]
    with torch.no_grad():
        population.hosts.theta[1] = poison
    sick = [measure(population, split).loss_R, evaluate(population, split).accuracy_R]
    sick += [coalition_losses(population, split, rows, every)]
    sick += [getattr(population.slots, name).clone() for name in WORTH]
    others = [0, 2, 3]
    for before, after in zip(healthy, sick, strict=True):
        same_numbers(after[others], before[others])
    assert sick[0].isnan().tolist() == [False, True, False, False]
    assert not population.slots.contribution[1].isfinite().any()


@kinds
def test_a_sick_seed_is_measured_alone(kind: SiteKind):
    """Its row without it is healthy: the loss is NaN, and every other row as before."""
    population = trained(kind)
    split = make_split(kind, 30, torch.float64, seed=5)
    healthy = evaluate(population, split).loss_R
    place = (0, int(population.slots.blueprint[1, 0]))
    bank = population.seeds[place]
    with torch.no_grad():
        bank.theta[bank.row.tolist().index(1)] = float("nan")
    sick = measure(population, split).loss_R
    assert sick.isnan().tolist() == [False, True, False, False]
    assert torch.equal(sick[[0, 2, 3]], healthy[[0, 2, 3]])
    without = coalition_losses(population, split, np.array([1]), np.array([[False, False]]))
    close(without[0], losses_of(population, 1, [False, False], split).mean())


@kinds
@pytest.mark.parametrize("stage", [Stage.TRAINING, Stage.PROBATIONARY])
def test_a_constant_in_front_of_a_batch_norm_is_worth_nothing(kind: SiteKind, stage: Stage):
    """Such a seed computes nothing, wherever the running statistics stand: within two standard errors of 0."""
    population = populate(kind, ROWS, norm="batch", kernel=1)
    data, split = make_split(kind, 64), make_split(kind, CHUNK + 30, seed=5)
    train_on(population, ROWS, data, total=200, learning_rate=0.03).run(100)
    blueprint = Blueprint.NORM
    bring(population, {(row, 0): Wish(blueprint, stage, target=2) for row in ROWS})
    with torch.no_grad():
        theta = population.seeds[0, int(blueprint)].theta
        theta.zero_()
        theta[:, theta.shape[1] // 2 :] = 2.0  # weight 0, bias 2
        for _ in range(60):
            x = shared(data.x, population.rows, population.lane_axis)
            population.forward(x, population.main_pass, statistics=Statistics.UPDATED)
    measure(population, split)
    slots = population.slots
    name = "incubator_gain" if stage is Stage.TRAINING else "contribution"
    worth_R, error_R = getattr(slots, name)[:, 0], getattr(slots, f"{name}_se")[:, 0]
    assert (worth_R.abs() <= 2 * error_R).all(), (worth_R, error_R)
    assert (error_R < 1e-3).all()


@kinds
@norms
def test_only_the_examples_that_count_are_measured(kind: SiteKind, norm: str):
    """Losses, accuracy, contributions, gains, their standard errors and coalitions are those of these alone."""
    population = trained(kind, norm)
    whole = make_split(kind, CHUNK + 22, torch.float64, seed=5)
    counted_N = torch.rand(len(whole.y), generator=torch.Generator().manual_seed(0)) < 0.6
    holed = Split(whole.x, whole.y.masked_fill(~counted_N, IGNORED))
    rest = Split(whole.x[counted_N], whole.y[counted_N])
    told: list[list[Tensor]] = []
    for split in (rest, holed, whole):
        found = [*vars(evaluate(population, split)).values(), *vars(measure(population, split)).values()]
        found += [getattr(population.slots, name).clone() for name in WORTH]
        found += [coalition_losses(population, split, np.array(ROWS), np.ones((4, 2), dtype=bool))]
        told.append(found)
    for expected, ours, other in zip(*told, strict=True):
        same_numbers(ours, expected)
        assert not torch.equal(ours.nan_to_num(), other.nan_to_num())


def test_accuracy_is_a_fraction_of_the_examples():
    population = populate(SiteKind.VECTOR, [0, 1])
    split = make_split(SiteKind.VECTOR, 50)
    trainer = train_on(population, [0, 1], split, batch_size=25, total=400)
    trainer.run(400)
    accuracy_R = evaluate(population, split).accuracy_R
    assert (accuracy_R > 0.9).all()
    assert (accuracy_R <= 1).all()
    wrong = Split(split.x, (split.y + 1) % 3)
    assert (evaluate(population, wrong).accuracy_R < 0.1).all()
