"""The incubator: a seed in TRAINING learns, and its host is bit for bit the host alone."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Op, Operator, SiteKind
from esper.leyline.stages import Stage
from esper.tolaria.batches import shared
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import coalition_losses, measure
from esper.tolaria.training import Trainer
from helpers.growing import act
from helpers.population_tools import (
    BLUEPRINTS,
    HOSTS,
    KINDS,
    Wish,
    bring,
    decide,
    lanes_of_row,
    make_split,
    mixed_stages,
    network_with,
    populate,
    record,
    same_numbers,
    same_state,
    train_on,
)

INCUBATORS = ["shadow", "straight-through"]
IDS = [0, 1, 2]
NORMS = ["none", "batch"]
UPDATES = 12
ADD, MULTIPLY, GATE = Operator

incubators = pytest.mark.parametrize("incubator", INCUBATORS)
kinds = pytest.mark.parametrize("kind", KINDS)
norms = pytest.mark.parametrize("norm", NORMS)


def two_incubated(kind: SiteKind) -> dict[tuple[int, int], Wish]:
    """A row with a seed at both sites, a row with one behind, and a row without."""
    first, second, third = BLUEPRINTS[kind]
    return {
        (0, 0): Wish(first, Stage.TRAINING, GATE),
        (0, 1): Wish(second, Stage.TRAINING, MULTIPLY),
        (1, 1): Wish(third, Stage.TRAINING, ADD),
    }


def pair(kind: SiteKind, norm: str, incubator: str, **more: object) -> tuple[Population, Population]:
    """A population with seeds in the incubator, and one that never grew."""
    grown, alone = (populate(kind, IDS, incubator=incubator, norm=norm, **more) for _ in range(2))
    bring(grown, two_incubated(kind))
    return grown, alone


def logits_of(population: Population, split: Split) -> Tensor:
    x = shared(split.x, population.rows, population.lane_axis)
    with torch.no_grad():
        return population.forward(x, population.main_pass, statistics=Statistics.RUNNING)[0]


def host_state(population: Population) -> dict[tuple[object, str], Tensor]:
    """All rows' host parameters, optimizer state and buffers."""
    rows = (lanes_of_row(population, row) for row in range(population.rows))
    return {(row, name): t for row, state in enumerate(rows) for (key, name), t in state.items() if key == HOSTS}


@incubators
@kinds
@norms
def test_the_host_is_bit_for_bit_the_host_alone(kind: SiteKind, norm: str, incubator: str):
    data, held_out = make_split(kind, 32), make_split(kind, 20, seed=1)
    grown, alone = pair(kind, norm, incubator)
    trainers = [train_on(p, IDS, data) for p in (grown, alone)]
    recorders = [record(trainer) for trainer in trainers]
    for _ in range(UPDATES):
        losses = [trainer.run(1) for trainer in trainers]
        assert torch.equal(*losses)
        assert torch.equal(*(r.of(p.hosts) for r, p in zip(recorders, (grown, alone), strict=True)))
        assert torch.equal(logits_of(grown, held_out), logits_of(alone, held_out))
        same_state(host_state(grown), host_state(alone))
    # It was a real training, of the seeds as well.
    assert not torch.equal(alone.hosts.theta, populate(kind, IDS, norm=norm).hosts.theta)
    assert all((bank.steps == UPDATES).all() for bank in grown.seeds.values())


@incubators
@kinds
@norms
def test_the_training_pass_gives_the_logits_of_the_host_alone(kind: SiteKind, norm: str, incubator: str):
    grown, alone = pair(kind, norm, incubator)
    # A seed's last layer starts at 0; these say something.
    with torch.no_grad():
        for bank in grown.seeds.values():
            bank.theta += 0.3
    x = shared(make_split(kind, 9).x, len(IDS), grown.lane_axis)
    ours, _ = grown.forward(x, grown.training_pass, statistics=Statistics.UPDATED)
    theirs, _ = alone.forward(x, alone.training_pass, statistics=Statistics.UPDATED)
    assert torch.equal(ours, theirs)
    for mine, other in zip(grown.hosts.buffers, alone.hosts.buffers, strict=True):
        assert torch.equal(mine, other)


@incubators
@kinds
@norms
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_seed_of_nan_leaves_the_host_alone(kind: SiteKind, norm: str, incubator: str, poison: float):
    data, held_out = make_split(kind, 32), make_split(kind, 20, seed=1)
    grown, alone = pair(kind, norm, incubator)
    with torch.no_grad():
        for bank in grown.seeds.values():
            bank.theta.fill_(poison)
    trainers = [train_on(p, IDS, data) for p in (grown, alone)]
    for _ in range(5):
        losses = [trainer.run(2) for trainer in trainers]
        assert torch.equal(*losses)
        for of_grown, of_alone in zip(
            (measure(grown, held_out).loss_R, logits_of(grown, held_out)),
            (measure(alone, held_out).loss_R, logits_of(alone, held_out)),
            strict=True,
        ):
            assert torch.equal(of_grown, of_alone)
    same_state(host_state(grown), host_state(alone))
    assert not grown.slots.incubator_gain.isfinite().any()


@incubators
@kinds
@norms
def test_the_seed_learns(kind: SiteKind, norm: str, incubator: str):
    """On a host that stands still, every update lowers the loss that the network would have with the seed."""
    data = make_split(kind, 48, torch.float64)
    grown, _ = pair(kind, norm, incubator, dtype=torch.float64)
    x = shared(data.x, len(IDS), grown.lane_axis)
    with torch.no_grad():
        for _ in range(150):
            # Until the running statistics are those of the batch.
            grown.forward(x, grown.main_pass, statistics=Statistics.UPDATED)
    still = [grown.hosts.theta.detach().clone(), *(b.clone() for b in grown.hosts.buffers)]
    # Straight through, a seed never sees what it does itself: steps so small that this does not matter yet.
    rate = 0.01 if incubator == "shadow" else 0.001
    trainer = train_on(grown, IDS, data, batch_size=48, learning_rate=rate, warmup=0.0, final_share=1.0)
    place = grown.slots.stage == int(Stage.TRAINING)
    if incubator == "straight-through" and norm == "batch":
        # The gradient through a norm of the batch is not that of the network that is measured, where one lies behind.
        place[:, 0] = False
    rows, sites = place.nonzero(as_tuple=True)
    enabled = torch.zeros(len(rows), 2, dtype=torch.bool)
    enabled[torch.arange(len(rows)), sites] = True

    measure(grown, data)
    # A seed starts as the identity, whatever its operator.
    assert (grown.slots.incubator_gain[place] == 0).all()
    gains, losses = [grown.slots.incubator_gain[place]], []
    for _ in range(UPDATES):
        trainer.run(1)
        for tensor, value in zip([grown.hosts.theta.detach(), *grown.hosts.buffers], still, strict=True):
            tensor.copy_(value)
        measure(grown, data)
        gains.append(grown.slots.incubator_gain[place])
        losses.append(coalition_losses(grown, data, rows.numpy(), enabled.numpy()))
        assert (grown.slots.gradient_norm[place] > 0).all()
        assert grown.slots.gradient_norm[place].isfinite().all()
    assert all((later > earlier).all() for earlier, later in itertools.pairwise(gains)), gains
    assert all((later < earlier).all() for earlier, later in itertools.pairwise(losses)), losses


@incubators
@kinds
def test_only_seeds_that_are_blended_or_incubated_learn(kind: SiteKind, incubator: str):
    population = populate(kind, IDS, incubator=incubator)
    first, second, _ = BLUEPRINTS[kind]
    bring(population, {(0, 0): Wish(first, Stage.GERMINATED), (1, 0): Wish(first, Stage.TRAINING)})
    trainer = train_on(population, IDS, make_split(kind, 32))
    before = population.seeds[0, first].theta.clone()
    trainer.run(3)
    after = population.seeds[0, first]
    assert torch.equal(after.theta[0], before[0])
    assert not torch.equal(after.theta[1], before[1])
    assert after.steps.tolist() == [0, 3]
    assert second not in {blueprint for _, blueprint in population.seeds}
    assert population.slots.gradient_norm[:, 0].isfinite().tolist() == [False, True, False]


class Worlds:
    """What a seed in the incubator should learn, written with plain modules and `torch.autograd`."""

    def __init__(self, population: Population, row: int, site: int) -> None:
        network = network_with(population, row, [s == site for s in range(population.slots.slots)])
        parts = list(network)
        self.before, self.grown, self.behind = network[: site + 1], parts[site + 1], network[site + 2 :]

    def shadow(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient of the loss that the network would have with the seed blended and the host frozen behind it.

        Its norms have the statistics that the seed gives them, not those of the host without it.
        """
        h = self.before.train()(x).detach()
        loss = cross_entropy(self.behind.train()(self.grown(h)), y)
        return _flat(torch.autograd.grad(loss, list(self.grown.seed.parameters())))

    def straight_through(self, x: Tensor, y: Tensor) -> Tensor:
        """Gradient at the site of the host alone, pulled back through what the seed would add there."""
        h = self.before.train()(x).detach().requires_grad_()
        (upstream,) = torch.autograd.grad(cross_entropy(self.behind.train()(h), y), h)
        return _flat(torch.autograd.grad(self.grown(h.detach()), list(self.grown.seed.parameters()), upstream))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@kinds
@incubators
@pytest.mark.parametrize("norm", ["none", "batch", "group"])
@pytest.mark.parametrize("operator", list(Operator))
def test_the_gradient_is_that_of_its_plain_formula(kind: SiteKind, norm: str, incubator: str, operator: Operator):
    data = make_split(kind, 24, torch.float64)
    population = populate(kind, IDS, incubator=incubator, norm=norm, dtype=torch.float64)
    blueprint = BLUEPRINTS[kind][0]
    bring(population, {(1, 0): Wish(blueprint, Stage.TRAINING, operator, target=1)})
    bank = population.seeds[0, blueprint]
    with torch.no_grad():
        bank.theta += 0.2
    trainer = train_on(population, IDS, data)
    (index_RB,) = trainer.order.indices(0, 1)
    before = copy.deepcopy(population)
    recorder = record(trainer)
    trainer.run(1)
    world = Worlds(before, 1, 0)
    formula = world.shadow if incubator == "shadow" else world.straight_through
    expected = formula(data.x[index_RB[1]], data.y[index_RB[1]])
    torch.testing.assert_close(recorder.of(bank)[0], expected, rtol=1e-9, atol=1e-13)
    assert expected.norm() > 1e-5


def first_segment_gradients(trainer: Trainer) -> Tensor:
    """Norm of each row's gradient in the host's first segment at the next update."""
    population = trainer.population
    recorder = record(trainer)
    trainer.run(1)
    size = population.host.segments[0].parameter_count
    return recorder.of(population.hosts)[:, :size].norm(dim=1)


@kinds
@incubators
@pytest.mark.parametrize("stage", [Stage.FOSSILIZED, Stage.BLENDING, Stage.PROBATIONARY])
@pytest.mark.parametrize("target", [0, 2], ids=["half", "full"])
def test_gradients_reach_below_a_blended_seed(kind: SiteKind, incubator: str, stage: Stage, target: int):
    population = populate(kind, IDS, incubator=incubator, activation="none")
    blueprint = BLUEPRINTS[kind][0]
    wishes = {(row, 0): Wish(blueprint, stage, operator, target) for row, operator in enumerate(Operator)}
    trainer = train_on(population, IDS, make_split(kind, 32))
    bring(population, wishes, trainer)
    for _ in range(4):
        norm_R = first_segment_gradients(trainer)
        assert norm_R.isfinite().all()
        assert (norm_R > 1e-4).all()
        assert (population.slots.gradient_norm[:, 0] > 1e-5).all()
        assert population.slots.gradient_norm[:, 0].isfinite().all()
    # The gate of the row that has one learns too, once its seed says something.
    gate = population.seed_gates[0]
    assert gate.row.tolist() == [int(GATE)]
    assert gate.theta.abs().max() > 0


@kinds
def test_a_blended_seed_passes_gradients_on_both_ways(kind: SiteKind):
    """The gradient below a seed is that of host and seed together, not of the host's path alone."""
    population = populate(kind, IDS, dtype=torch.float64, activation="none")
    blueprint = BLUEPRINTS[kind][0]
    bring(population, {(row, 0): Wish(blueprint, Stage.BLENDING, op) for row, op in enumerate(Operator)})
    with torch.no_grad():
        for bank in population.banks:
            bank.theta += 0.1
    data = make_split(kind, 24, torch.float64)
    trainer = train_on(population, IDS, data)
    (index_RB,) = trainer.order.indices(0, 1)
    networks = [network_with(population, row, [True, False]) for row in range(len(IDS))]
    recorder = record(trainer)
    trainer.run(1)
    for row, network in enumerate(networks):
        cross_entropy(network(data.x[index_RB[row]]), data.y[index_RB[row]]).backward()
        host = [p.grad.flatten() for name, p in network.named_parameters() if name.startswith("segment")]
        torch.testing.assert_close(recorder.of(population.hosts)[row], torch.cat(host), rtol=1e-9, atol=1e-12)


@kinds
@incubators
def test_incubation_beside_blended_seeds_of_the_same_row(kind: SiteKind, incubator: str):
    """Below, above and beside: the row trains as it would without the seed in the incubator."""
    ids = [0, 1, 2, 3]
    wishes = mixed_stages(kind)
    data = make_split(kind, 32)
    with_seed, without = (populate(kind, ids, incubator=incubator, norm="batch") for _ in range(2))
    bring(with_seed, wishes)
    bring(without, wishes)
    incubated = (without.slots.stage == int(Stage.TRAINING)).nonzero().tolist()
    assert len(incubated) == 3
    decide(with_seed, {})
    decide(without, {row: act(Op.CULL, site) for row, site in incubated})
    assert not (without.slots.stage == int(Stage.TRAINING)).any()
    trainers = [train_on(p, ids, data) for p in (with_seed, without)]
    for _ in range(6):
        losses = [trainer.run(1) for trainer in trainers]
        same_numbers(*losses)
    for row in ids:
        ours, theirs = lanes_of_row(with_seed, row), lanes_of_row(without, row)
        same_state({key: ours[key] for key in theirs}, theirs)
