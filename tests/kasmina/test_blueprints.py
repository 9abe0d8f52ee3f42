"""Every blueprint under every operator at every kind of site, blended by the population itself."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from esper.kasmina.banks import Bank
from esper.kasmina.blueprints.registry import gate_layer, seed_cost, seed_layer, seed_parameters
from esper.kasmina.export import export_row
from esper.kasmina.optim import RowOptimizer
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, Operator, SiteKind
from esper.leyline.config import OptimizerConfig
from esper.leyline.sites import Site
from helpers.growing import CLASSES, EXAMPLES, draw, germinate, lay_out, make_population, perform, to_fossilized

KINDS = (SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE)
UPDATES, BATCH = 50, 12
CASES = {kind: [(b, o) for b in sorted(BLUEPRINTS_OF_KIND[kind]) for o in Operator] for kind in KINDS}
"""What each row of a kind's population grows."""
every_seed = pytest.mark.parametrize(
    ("kind", "row"),
    [pytest.param(k, r, id=f"{k}-{b.name}-{o.name}") for k in KINDS for r, (b, o) in enumerate(CASES[k])],
)


def grown(kind: SiteKind, width: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Population, torch.Tensor]:
    """One row for each case, its seed committed at alpha 1 and untrained; and the logits before anything grew."""
    cases = CASES[kind]
    population = make_population(kind, len(cases), (width,), dtype=dtype)
    alone = population.forward(inputs(population), population.main_pass, statistics=Statistics.RUNNING)[0].detach()
    perform(population, {r: [germinate(0, b, o), *to_fossilized(0)] for r, (b, o) in enumerate(cases)})
    assert (population.slots.alpha == 1).all()
    assert population.base.all()
    return population, alone


def inputs(population: Population) -> torch.Tensor:
    example = EXAMPLES[population.host.kind]
    return lay_out(population, draw(0, population.rows, BATCH, *example, dtype=population.dtype))


def banks_of(population: Population) -> list[Bank]:
    return [*population.seeds.values(), *population.seed_gates.values()]


def tensors_of(population: Population, row: int, tables: dict[Bank, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the seed of a row by name, cut from tables [N, P] of the banks."""
    pieces = {}
    for bank, table in tables.items():
        kind = "gate" if bank in population.seed_gates.values() else "seed"
        for lane in np.flatnonzero(bank.row == row):
            split = bank.layer.split(table[lane : lane + 1])
            pieces |= {f"{kind}.{s.name}": t[0] for s, t in zip(bank.layer.params, split, strict=True)}
    return pieces


@dataclass
class Training:
    """What happened to the seeds of one kind: losses [updates + 1, R], and by row and name the gradients seen."""

    population: Population
    alone: torch.Tensor
    start: torch.Tensor
    loss: torch.Tensor
    first_gradient: list[dict[str, torch.Tensor]]
    ever_moved: list[dict[str, bool]]


@cache
def trained(kind: SiteKind) -> Training:
    """Train every seed, and nothing else, on a small regression."""
    population, alone = grown(kind)
    x, rows = inputs(population), population.rows
    target = alone + 0.5 * draw(1, rows, BATCH, CLASSES)
    optimizer = RowOptimizer(OptimizerConfig(weight_decay=0.0))
    losses, first, moved = [], [], [{} for _ in range(rows)]
    start = population.forward(x, population.main_pass, statistics=Statistics.UPDATED)[0].detach()
    banks = banks_of(population)
    for update in range(UPDATES + 1):
        logits, _ = population.forward(x, population.main_pass, statistics=Statistics.UPDATED)
        loss_R = (logits - target).square().mean((1, 2))
        losses.append(loss_R.detach())
        grads = torch.autograd.grad(loss_R.sum(), [bank.theta for bank in banks])
        tables = dict(zip(banks, grads, strict=True))
        for r in range(rows):
            pieces = tensors_of(population, r, tables)
            if update == 0:
                first.append({name: piece.clone() for name, piece in pieces.items()})
            for name, piece in pieces.items():
                moved[r][name] = moved[r].get(name, False) or bool(piece.any())
        rates = [torch.full((len(bank),), 0.02, dtype=population.dtype) for bank in banks]
        optimizer.step(banks, list(grads), rates, [None] * len(banks))
    return Training(population, alone, start, torch.stack(losses), first, moved)


@every_seed
def test_a_new_seed_is_the_identity_at_full_alpha(kind, row):
    result = trained(kind)
    assert torch.equal(result.start[row], result.alone[row])


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_holds_in_single_precision_too(kind):
    population, alone = grown(kind, dtype=torch.float32)
    logits, _ = population.forward(inputs(population), population.main_pass, statistics=Statistics.UPDATED)
    assert torch.equal(logits, alone)


@every_seed
def test_a_new_seed_gets_a_gradient_from_the_first_update(kind, row):
    gradients = trained(kind).first_gradient[row]
    assert all(g.isfinite().all() for g in gradients.values())
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    assert norm > 1e-4
    # A norm over an all-zero tensor would multiply it by some hundreds.
    assert norm < 10


@every_seed
def test_training_the_seed_alone_lowers_the_loss(kind, row):
    loss = trained(kind).loss[:, row]
    assert loss.isfinite().all()
    assert loss[-1] < 0.97 * loss[0]


@every_seed
def test_no_parameter_is_dead(kind, row):
    result = trained(kind)
    assert result.ever_moved[row]
    assert [name for name, moved in result.ever_moved[row].items() if not moved] == []


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_did_not_learn(kind):
    """Else the tests above would say nothing of the seeds."""
    assert torch.equal(trained(kind).population.hosts.theta, make_population(kind, len(CASES[kind])).hosts.theta)


@cache
def exported(kind: SiteKind, width: int) -> tuple[Population, list[nn.Module]]:
    population, _ = grown(kind, width)
    return population, [export_row(population, r).get_submodule("r0c0") for r in range(population.rows)]


@every_seed
@pytest.mark.parametrize("width", [1, 2, 3, 20])
def test_the_declared_numbers_are_the_learned_ones(kind, row, width):
    blueprint, operator = CASES[kind][row]
    population, modules = exported(kind, width)
    site = population.host.slot_config.sites[0]
    declared = seed_parameters(blueprint, operator, site)
    assert declared == sum(p.numel() for p in modules[row].parameters())
    assert declared == sum(bank.theta.shape[1] for bank in banks_of(population) if row in bank.row)
    assert declared == population.slots.parameters[row, 0]


@every_seed
@pytest.mark.parametrize("width", [1, 2, 3, 20])
def test_the_declared_cost_is_what_torch_counts(kind, row, width):
    """Half of the floating-point operations of convolutions and matrix products, for one example."""
    blueprint, operator = CASES[kind][row]
    population, modules = exported(kind, width)
    site = population.host.slot_config.sites[0]
    with FlopCounterMode(display=False) as counter:
        modules[row](draw(2, BATCH, *site.shape))
    assert counter.get_total_flops() == 2 * BATCH * seed_cost(blueprint, operator, site)


@pytest.mark.parametrize("kind", KINDS)
def test_costs_and_counts_are_not_all_alike(kind):
    """Blueprints are choices: they differ in numbers or in cost."""
    site = Site(kind, 20, EXAMPLES[kind][1:], 1)
    for operator in Operator:
        sizes = {
            (seed_parameters(b, operator, site), seed_cost(b, operator, site), str(seed_layer(b, site).plain()))
            for b in BLUEPRINTS_OF_KIND[kind]
        }
        assert len(sizes) == len(BLUEPRINTS_OF_KIND[kind])
        pairs = [(Blueprint.LORA_SMALL, Blueprint.LORA_LARGE)]
        pairs += [(a, b) for a, b in [(Blueprint.MLP_SMALL, Blueprint.MLP_LARGE)] if kind is SiteKind.VECTOR]
        pairs += [(a, b) for a, b in [(Blueprint.CONV_LIGHT, Blueprint.CONV_HEAVY)] if kind is not SiteKind.VECTOR]
        for small, large in pairs:
            assert seed_parameters(small, operator, site) < seed_parameters(large, operator, site)
            assert seed_cost(small, operator, site) < seed_cost(large, operator, site)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [1, 2, 3, 6, 9, 40])
def test_no_rank_is_above_the_width_of_the_site(kind, width):
    site = Site(kind, width, EXAMPLES[kind][1:], 1)
    for blueprint, rank in ((Blueprint.LORA_SMALL, 2), (Blueprint.LORA_LARGE, 8)):
        assert seed_layer(blueprint, site).parameter_count == 2 * width * min(rank, width)
    hidden = min(width, max(4, width // 4))
    for blueprint in (Blueprint.BOTTLENECK, Blueprint.ATTENTION):
        # Weights into the narrow part have its number of rows; the layer's last bias is of the full width.
        sizes = [p.shape for p in seed_layer(blueprint, site).params if p.name.endswith("bias")]
        assert sizes[0] == (hidden,)
        assert sizes[-1] == (width,)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", Operator)
def test_the_gate_is_paid_for(kind, operator):
    site = Site(kind, 7, EXAMPLES[kind][1:], 1)
    bare = seed_layer(Blueprint.NORM, site)
    extra = (8, 7) if operator is Operator.GATE else (0, 0)
    assert gate_layer(site).parameter_count == 8
    assert seed_parameters(Blueprint.NORM, operator, site) == bare.parameter_count + extra[0]
    assert seed_cost(Blueprint.NORM, operator, site) == bare.cost(site.shape) + extra[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blueprint", Blueprint)
def test_only_what_fits_is_built_and_it_keeps_the_shape(kind, blueprint):
    site = Site(kind, 9, EXAMPLES[kind][1:], 1)
    if blueprint in BLUEPRINTS_OF_KIND[kind]:
        assert seed_layer(blueprint, site).output_shape(site.shape) == site.shape
    else:
        with pytest.raises(KeyError):
            seed_layer(blueprint, site)
