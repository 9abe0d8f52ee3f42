"""Mixed precision: passes in bfloat16, everything that lasts or is measured in float32."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina.export import export_row
from esper.kasmina.population import Population
from esper.kasmina.rows.core import RowLayer, Statistics
from esper.kasmina.rows.norms import RowBatchNorm, RowGroupNorm, RowLayerNorm
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Operator, SiteKind
from esper.leyline.config import OptimizerConfig
from esper.leyline.stages import Stage
from esper.tolaria.batches import BatchOrder
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import evaluate, measure
from esper.tolaria.training import Trainer
from helpers.growing import EXAMPLES
from helpers.population_tools import (
    HOST_NORMS,
    KINDS,
    LANE_STATE,
    Wish,
    bring,
    lanes_of_row,
    make_split,
    mixed_stages,
    populate,
    same_state,
)

HALF = torch.bfloat16
UPDATES, EXAMPLES_OF_CLASS, BATCH = 50, 64, 32
ROWS = [0, 1, 2, 3]
CASES = {kind: [(b, o) for b in sorted(BLUEPRINTS_OF_KIND[kind]) for o in Operator] for kind in KINDS}
"""What the rows of a kind's population grow."""
every_host = pytest.mark.parametrize(("kind", "norm"), [(k, n) for k in KINDS for n in HOST_NORMS[k]])
kinds = pytest.mark.parametrize("kind", KINDS)
incubators = pytest.mark.parametrize("incubator", ["shadow", "straight-through"])


def classes_of(kind: SiteKind) -> Split:
    """A pattern for each class, the same at every place, in noise that keeps losses away from 0."""
    generator = torch.Generator().manual_seed(0)
    channels, *extent = EXAMPLES[kind]
    y = torch.arange(3 * EXAMPLES_OF_CLASS) % 3
    pattern = torch.randn(3, channels, *[1] * len(extent), generator=generator)
    noise = torch.randn(len(y), channels, *extent, generator=generator)
    return Split(pattern[y] + (4 if extent else 2) * noise, y)


def trainer_of(population: Population, data: Split, precision: torch.dtype | None, batch: int = BATCH) -> Trainer:
    order = BatchOrder(4, torch.arange(population.rows), len(data.y), batch)
    return Trainer(population, data, order, OptimizerConfig(learning_rate=0.01), UPDATES, precision=precision)


@cache
def losses(kind: SiteKind, norm: str, precision: torch.dtype | None) -> Tensor:
    """Loss of every row, a blended seed in its first slot and the same in the incubator of its second."""
    cases = CASES[kind]
    population = populate(kind, range(len(cases)), (16, 12), norm=norm)
    stages = (Stage.PROBATIONARY, Stage.TRAINING)
    bring(population, {(r, s): Wish(b, stages[s], o) for r, (b, o) in enumerate(cases) for s in (0, 1)})
    data = classes_of(kind)
    trainer_of(population, data, precision).run(UPDATES)
    evaluation = measure(population, data)
    assert evaluation.loss_R.dtype == torch.float32
    assert population.slots.contribution[:, 0].isfinite().all()
    assert population.slots.incubator_gain[:, 1].isfinite().all()
    return evaluation.loss_R


@every_host
def test_losses_are_those_of_float32(kind: SiteKind, norm: str):
    """Every blueprint under every operator, within 2 % after 50 updates that taught something."""
    exact_R, mixed_R = (losses(kind, norm, precision) for precision in (None, HALF))
    assert exact_R.mean() < 0.7
    far = [(*CASES[kind][r], mixed_R[r], exact_R[r]) for r in ((mixed_R / exact_R - 1).abs() > 0.02).nonzero()[:, 0]]
    assert not far
    assert not torch.equal(mixed_R, exact_R)


def mixed(kind: SiteKind, incubator: str = "shadow", norm: str = "batch") -> tuple[Population, Split]:
    population = populate(kind, ROWS, norm=norm, incubator=incubator)
    bring(population, mixed_stages(kind))
    return population, make_split(kind, 32)


class Casts(TorchDispatchMode):
    """Counts copies to bfloat16 by the shape of what is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is HALF:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@kinds
@incubators
def test_each_table_is_cast_once_for_an_update(kind: SiteKind, incubator: str):
    population, data = mixed(kind, incubator, norm="none")
    trainer = trainer_of(population, data, HALF, batch=7)
    with Casts() as casts:
        trainer.run(1)
    tables = [tuple(bank.theta.shape) for bank in population.banks]
    of_tables = [shape for shape in casts.shapes if len(shape) == 2 and shape[1] > 1]
    assert sorted(shape for shape in of_tables if shape in tables) == sorted(tables)


@kinds
@incubators
def test_what_lasts_is_float32_and_the_passes_are_not(kind: SiteKind, incubator: str, monkeypatch):
    population, data = mixed(kind, incubator)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    forward = population.forward

    def watched(x, steps, **how):
        logits, streams = forward(x, steps, **how)
        seen.extend((x.dtype, t.dtype) for t in (logits, *streams))
        return logits, streams

    monkeypatch.setattr(population, "forward", watched)
    trainer = trainer_of(population, data, HALF, batch=8)
    before = {bank: bank.theta.detach().clone() for bank, _ in population.learning()}
    loss_R = trainer.run(3)
    assert set(seen) == {(HALF, HALF)}
    assert loss_R.dtype == torch.float32
    for bank in population.banks:
        state = [getattr(bank, name) for name in LANE_STATE] + bank.buffers
        assert {t.dtype for t in state} <= {torch.float32, torch.float64, torch.int64}
        assert all(t.isfinite().all() for t in state)
    # Steps smaller than bfloat16 can tell apart are kept: parameters are no longer numbers of bfloat16.
    for bank, theta in before.items():
        assert (bank.theta != theta).any()
        assert (bank.theta != bank.theta.to(HALF).float()).any()


@kinds
def test_without_it_every_bit_is_as_before(kind: SiteKind):
    """Whether it is left out or named, float32 casts nothing."""
    first, data = mixed(kind)
    second = copy.deepcopy(first)
    with Casts() as casts:
        losses = [trainer_of(p, data, precision).run(5) for p, precision in ((first, None), (second, torch.float32))]
    assert casts.shapes == []
    assert torch.equal(*losses)
    for row in ROWS:
        same_state(lanes_of_row(first, row), lanes_of_row(second, row))
    tables = first.tables(torch.float32)
    assert all(tables[bank] is bank.theta for bank in first.banks)


@kinds
@incubators
def test_the_host_learns_as_if_it_had_no_seed_in_the_incubator(kind: SiteKind, incubator: str):
    alone, grown = (populate(kind, ROWS, norm="batch", incubator=incubator) for _ in range(2))
    blueprints = sorted(BLUEPRINTS_OF_KIND[kind])
    operators = [*Operator, Operator.ADD]
    bring(grown, {(r, 0): Wish(blueprints[r], Stage.TRAINING, operators[r]) for r in ROWS})
    data = make_split(kind, 32)
    for population in (alone, grown):
        trainer_of(population, data, HALF, batch=8).run(4)
    assert torch.equal(alone.hosts.theta, grown.hosts.theta)
    assert all(torch.equal(*pair) for pair in zip(alone.hosts.buffers, grown.hosts.buffers, strict=True))


@kinds
def test_a_sick_row_is_sick_alone(kind: SiteKind):
    population, data = mixed(kind)
    with torch.no_grad():
        population.hosts.theta[1] = torch.nan
    healthy, _ = mixed(kind)
    for one in (population, healthy):
        trainer_of(one, data, HALF, batch=8).run(3)
    for row in (0, 2, 3):
        same_state(lanes_of_row(population, row), lanes_of_row(healthy, row))


@kinds
def test_an_export_is_what_is_measured(kind: SiteKind):
    population, data = mixed(kind)
    trainer_of(population, data, HALF, batch=8).run(10)
    evaluation = evaluate(population, data)
    for row in ROWS:
        module = export_row(population, row)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(module(data.x), data.y)
        torch.testing.assert_close(loss, evaluation.loss_R[row], rtol=1e-5, atol=1e-6)


NORMS = {
    "layer": RowLayerNorm(6),
    **{f"group {axes}": RowGroupNorm(2, 6, axes) for axes in (0, 1, 2)},
    **{f"batch {axes}": RowBatchNorm(6, axes) for axes in (0, 1, 2)},
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("statistics", Statistics)
def test_norms_compute_in_float32(name: str, statistics: Statistics):
    """To half a unit of the last place of bfloat16, where the mean is far from 0."""
    layer: RowLayer = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    shape = (3, 5, 6) if getattr(layer, "axes", 0) == 0 else (5, 18, 7, 4)[: 2 + layer.axes]
    x = (50 + torch.randn(shape, generator=generator)).to(HALF)
    theta = torch.randn(3, layer.parameter_count, generator=generator).to(HALF)
    buffers = [[b.low + torch.ones(3, 6) for b in layer.buffers] for _ in range(2)]
    ours = layer.forward(x, layer.split(theta), buffers[0], statistics=statistics)
    exact = layer.forward(x.float(), layer.split(theta.float()), buffers[1], statistics=statistics)
    assert ours.dtype == HALF
    assert torch.equal(ours, exact.to(HALF))
    assert all(torch.equal(*pair) for pair in zip(*buffers, strict=True))
