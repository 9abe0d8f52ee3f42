"""Any row of a grown population as a plain torch module: the same numbers, and no trace of Esper."""

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from esper.kasmina.banks import Bank
from esper.kasmina.export import describe, export_row, plain_module
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, Op, Operator, SiteKind
from esper.leyline.slots import AlphaMode
from esper.leyline.stages import Stage
from helpers.growing import (
    CLASSES,
    EXAMPLES,
    HALF,
    WAIT,
    Action,
    act,
    draw,
    germinate,
    lay_out,
    make_population,
    perform,
    to_blending,
    to_fossilized,
)

HOSTS: dict[str, tuple[SiteKind, dict[str, str]]] = {
    "vector": (SiteKind.VECTOR, {}),
    "vector layer": (SiteKind.VECTOR, {"norm": "layer"}),
    "vector batch": (SiteKind.VECTOR, {"norm": "batch"}),
    "signal group average": (SiteKind.SIGNAL, {"norm": "group", "pooling": "average"}),
    "signal batch": (SiteKind.SIGNAL, {"norm": "batch"}),
    "image max": (SiteKind.IMAGE, {"pooling": "max"}),
    "image batch average": (SiteKind.IMAGE, {"norm": "batch", "pooling": "average"}),
}
WIDTHS = (6, 5, 8)
BATCH = 4
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-6}
RESTING: dict[str, Callable[[int], list[Action]]] = {
    "germinated": lambda _: [],
    "incubated": lambda slot: to_blending(slot)[:1],
    "resting": lambda slot: [*to_blending(slot), WAIT, WAIT],
    "half": lambda slot: [*to_blending(slot), WAIT, WAIT, act(Op.SET_ALPHA_TARGET, slot, alpha_target=HALF)],
    "probationary": lambda slot: to_fossilized(slot)[:-1],
    "fossilized": to_fossilized,
    "culled": lambda slot: [*to_blending(slot), act(Op.CULL, slot)],
}
"""Ways to states that later decisions leave as they are."""
MOVING: dict[str, Callable[[int], list[Action]]] = {
    "rising": to_blending,
    "fading": lambda slot: [*to_fossilized(slot)[:-1], act(Op.CULL, slot, alpha_speed=1)],
}
"""Ways to states in the middle of a ramp: they come last in a row."""
SEED_STATES = {
    "germinated": (Stage.GERMINATED, False),
    "incubated": (Stage.TRAINING, False),
    "resting": (Stage.BLENDING, True),
    "half": (Stage.BLENDING, True),
    "probationary": (Stage.PROBATIONARY, True),
    "fossilized": (Stage.FOSSILIZED, True),
    "rising": (Stage.BLENDING, True),
    "fading": (Stage.BLENDING, True),
}
"""Stage of each state, and whether the seed is part of the forward pass."""
ROWS: list[tuple[tuple[str, Operator] | None, ...]] = [
    (None, None, None),
    (("fossilized", Operator.ADD), ("incubated", Operator.MULTIPLY), ("rising", Operator.GATE)),
    (("rising", Operator.ADD), ("fossilized", Operator.MULTIPLY), ("half", Operator.GATE)),
    (("half", Operator.MULTIPLY), ("rising", Operator.MULTIPLY), ("incubated", Operator.GATE)),
    (("fossilized", Operator.GATE), ("probationary", Operator.GATE), ("fading", Operator.ADD)),
    (("incubated", Operator.GATE), ("half", Operator.ADD), ("fossilized", Operator.MULTIPLY)),
    (("culled", Operator.ADD), ("fading", Operator.GATE), ("germinated", Operator.ADD)),
    (("resting", Operator.GATE), None, ("fossilized", Operator.ADD)),
    (("incubated", Operator.ADD), None, None),
    (("fossilized", Operator.ADD), ("fossilized", Operator.ADD), ("fossilized", Operator.GATE)),
]
BLUEPRINTS = {
    SiteKind.VECTOR: [Blueprint.MLP_SMALL, Blueprint.NORM, Blueprint.ATTENTION, Blueprint.LORA_LARGE],
    SiteKind.SIGNAL: [Blueprint.CONV_LIGHT, Blueprint.NORM, Blueprint.ATTENTION, Blueprint.DEPTHWISE],
    SiteKind.IMAGE: [Blueprint.BOTTLENECK, Blueprint.NORM, Blueprint.ATTENTION, Blueprint.CONV_HEAVY],
}


def blueprint_of(kind: SiteKind, row: int, slot: int) -> Blueprint:
    return BLUEPRINTS[kind][(row + 2 * slot) % 4]


def shake(population: Population) -> None:
    """Move every number away from where it starts, as training would: new seeds would be the identity.

    Larger biases keep the units of the hosts alive.
    """
    with torch.no_grad():
        population.hosts.theta += 0.3 * (1 - population.hosts.decay_P)
        for number, bank in enumerate(population.banks):
            bank.theta += 0.2 * draw(number, *bank.theta.shape, dtype=population.dtype)
            for buffer in bank.buffers:
                buffer.copy_((buffer + 0.3 * draw(number + 50, *buffer.shape, dtype=population.dtype)).abs())


@cache
def grown(name: str, dtype: torch.dtype = torch.float64) -> tuple[Population, torch.Tensor]:
    """The mixed population on one host, and examples [R, B, ...] of every row."""
    kind, host = HOSTS[name]
    population = make_population(kind, len(ROWS), WIDTHS, dtype=dtype, **host)
    plans = {}
    for r, cells in enumerate(ROWS):
        planted = [(cell, s) for s, cell in enumerate(cells) if cell]
        plans[r] = [WAIT]
        for (state, operator), s in sorted(planted, key=lambda p: p[0][0] in MOVING):
            plans[r] += [germinate(s, blueprint_of(kind, r, s), operator), *(RESTING | MOVING)[state](s)]
    perform(population, plans)
    shake(population)
    return population, draw(99, population.rows, BATCH, *EXAMPLES[kind], dtype=dtype)


def logits_of(population: Population, x: torch.Tensor, *, training: bool = False) -> torch.Tensor:
    statistics = Statistics.UPDATED if training else Statistics.RUNNING
    return population.forward(lay_out(population, x), population.main_pass, statistics=statistics)[0]


def flat_gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in module.named_parameters()}


def named(bank: Bank, row: int, table: torch.Tensor, rename: Callable[[str], str]) -> dict[str, torch.Tensor]:
    """One lane of a table [N, P] cut by hand into the declared parameters."""
    ((lane,),) = np.nonzero(bank.row == row)
    pieces, at = {}, 0
    for spec in bank.layer.params:
        pieces[rename(spec.name)] = table[lane, at : at + spec.size].reshape(spec.shape)
        at += spec.size
    assert at == table.shape[1]
    return pieces


def of_row(population: Population, row: int, tables: dict[Bank, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a row's forward pass learns, by the names of its export, cut from tables of the banks."""
    pieces = named(population.hosts, row, tables[population.hosts], lambda name: f"segment{name}")
    for (site, blueprint), bank in population.seeds.items():
        if population.base[row, site] and population.structure.blueprint[row, site] == blueprint:
            pieces |= named(bank, row, tables[bank], f"r0c{site}.seed.{{}}".format)
    for site, bank in population.seed_gates.items():
        if population.base[row, site] and population.structure.operator[row, site] == Operator.GATE:
            pieces |= named(bank, row, tables[bank], f"r0c{site}.gate.{{}}".format)
    return pieces


every_host = pytest.mark.parametrize("name", HOSTS)
every_row = pytest.mark.parametrize("row", range(len(ROWS)))


@every_host
def test_the_population_is_as_mixed_as_planned(name):
    population, _ = grown(name)
    slots, seen = population.slots, set()
    for r, cells in enumerate(ROWS):
        for s, cell in enumerate(cells):
            if cell is None or cell[0] == "culled":
                assert slots.seed_id[r, s] == -1
                continue
            stage, blended = SEED_STATES[cell[0]]
            assert slots.stage[r, s] == stage
            assert slots.operator[r, s] == cell[1]
            assert population.base[r, s] == blended
            moving = slots.alpha_mode[r, s] != AlphaMode.HOLD
            assert moving == (cell[0] in MOVING)
            if cell[0] in ("rising", "fading", "half"):
                assert 0.1 < slots.alpha[r, s] < 0.9
            seen.add((cell[0], cell[1]))
    assert {operator for _, operator in seen} == set(Operator)
    for operator in Operator:
        assert {"rising", "fossilized", "half"} <= {state for state, o in seen if o is operator}


@every_host
@every_row
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_the_populations(name, row, dtype):
    population, x = grown(name, dtype)
    module = export_row(population, row)
    assert not module.training
    told, expected = module(x[row]), logits_of(population, x)[row]
    assert told.shape == (BATCH, CLASSES)
    assert told.dtype == dtype
    assert torch.allclose(told, expected, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@every_host
def test_every_grown_seed_counts(name):
    """Else the test above could not tell a lost seed: without any of its seeds a row's logits are others."""
    population, x = grown(name)
    expected = logits_of(population, x)
    for row in range(population.rows):
        for site in np.flatnonzero(population.base[row]):
            description, state = describe(population, row)
            description["children"].pop(f"r0c{site}")
            rest = plain_module(description, {k: v for k, v in state.items() if not k.startswith(f"r0c{site}.")})
            assert (rest.eval()(x[row]) - expected[row]).abs().max() > 1e-4


@every_host
@every_row
def test_there_is_no_trace_of_esper(name, row):
    for module in export_row(grown(name)[0], row).modules():
        for ancestor in type(module).__mro__[:-1]:
            assert ancestor.__module__.startswith("torch.nn.") or ancestor.__module__ == "esper.kasmina.plain"


@every_host
@every_row
def test_the_parameters_are_those_of_the_forward_pass(name, row):
    population, _ = grown(name)
    module = export_row(population, row)
    blended = torch.from_numpy(population.base[row])
    seeds = population.slots.parameters[row, blended].sum().item()
    assert sum(p.numel() for p in module.parameters()) == population.host.body.parameter_count + seeds
    assert all(p.requires_grad for p in module.parameters())
    tables = {bank: bank.theta.detach() for bank in population.banks}
    expected = of_row(population, row, tables)
    assert {n for n, _ in module.named_parameters()} == set(expected)
    for parameter_name, parameter in module.named_parameters():
        assert torch.equal(parameter, expected[parameter_name]), parameter_name
    assert [c for c, _ in module.named_children() if c.startswith("r0")] == [f"r0c{s}" for s in torch.where(blended)[0]]


@every_host
@pytest.mark.parametrize("training", [False, True])
def test_gradients_are_the_rows(name, training):
    """Of a loss that weights every logit, in both modes of the batch norms; their statistics move alike, too."""
    population, x = grown(name)
    weights = draw(7, population.rows, BATCH, CLASSES)
    saved = [b.clone() for b in population.hosts.buffers]
    modules = [export_row(population, row).train(training) for row in range(population.rows)]
    logits = logits_of(population, x, training=training)
    banks = list(population.banks)
    grads = torch.autograd.grad((logits * weights).sum(), [b.theta for b in banks], allow_unused=True)
    tables = {b: torch.zeros_like(b.theta) if g is None else g for b, g in zip(banks, grads, strict=True)}
    statistics = [b.clone() for b in population.hosts.buffers]
    for buffer, old in zip(population.hosts.buffers, saved, strict=True):
        buffer.copy_(old)
    assert all(torch.equal(a, b) for a, b in zip(saved, statistics, strict=True)) == (not (training and saved))
    for row, module in enumerate(modules):
        told = module(x[row])
        assert torch.allclose(told, logits[row], rtol=1e-12, atol=1e-12)
        (told * weights[row]).sum().backward()
        expected = of_row(population, row, tables)
        gradients = flat_gradients(module)
        assert set(gradients) == set(expected)
        for parameter_name, gradient in gradients.items():
            close = torch.allclose(gradient, expected[parameter_name], rtol=1e-10, atol=1e-12)
            assert close, (row, parameter_name)
        buffers = {n: b for n, b in module.named_buffers() if b.is_floating_point()}
        for spec, statistic in zip(population.hosts.layer.buffers, statistics, strict=True):
            assert torch.allclose(buffers[f"segment{spec.name}"], statistic[row], rtol=1e-12, atol=1e-12)


@every_host
def test_an_export_is_a_copy(name):
    population, x = grown(name)
    before = logits_of(population, x).detach().clone()
    module = export_row(population, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    module.train()(x[1])
    assert torch.equal(logits_of(population, x), before)
    assert not torch.allclose(module.eval()(x[1]), before[1])


@pytest.mark.parametrize("kind", list(BLUEPRINTS))
@pytest.mark.parametrize("operator", Operator)
@pytest.mark.parametrize("alpha", ["fossilized", "rising"])
def test_rows_that_all_hold_the_same_seed(kind, operator, alpha):
    """One blueprint in every row is computed without gathering lanes."""
    population = make_population(kind, 3, (6,))
    blueprint = BLUEPRINTS[kind][0]
    perform(population, {r: [germinate(0, blueprint, operator), *(RESTING | MOVING)[alpha](0)] for r in range(3)})
    (call,) = population.main_pass.calls[0]
    assert call.lanes is None
    shake(population)
    x = draw(5, 3, BATCH, *EXAMPLES[kind])
    logits = logits_of(population, x)
    (gradient,) = torch.autograd.grad(logits.square().sum(), [population.hosts.theta])
    for row in range(3):
        module = export_row(population, row)
        told = module(x[row])
        assert torch.allclose(told, logits[row], rtol=1e-12, atol=1e-12)
        told.square().sum().backward()
        expected = named(population.hosts, row, gradient, lambda name: f"segment{name}")
        for parameter_name, piece in expected.items():
            assert torch.allclose(module.get_parameter(parameter_name).grad, piece, rtol=1e-10, atol=1e-12)
