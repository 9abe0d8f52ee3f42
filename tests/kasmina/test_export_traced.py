"""Exported networks under `torch.fx` and `torch.jit.script`: every blueprint, under every operator, of every kind."""

from functools import cache

import pytest
import torch

from esper.kasmina.export import export_row
from esper.kasmina.population import Population
from esper.leyline.actions import BLUEPRINTS_OF_KIND, Operator, SiteKind
from helpers.growing import EXAMPLES, draw, germinate, make_population, perform, to_fossilized

KINDS = (SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE)
CASES = {kind: [(b, o) for b in sorted(BLUEPRINTS_OF_KIND[kind]) for o in Operator] for kind in KINDS}
HOST = {
    SiteKind.VECTOR: {"norm": "layer"},
    SiteKind.SIGNAL: {"norm": "group", "pooling": "average"},
    SiteKind.IMAGE: {"norm": "batch", "pooling": "max"},
}
every_seed = pytest.mark.parametrize(
    ("kind", "row"),
    [pytest.param(k, r, id=f"{k}-{b.name}-{o.name}") for k in KINDS for r, (b, o) in enumerate(CASES[k])],
)


@cache
def grown(kind: SiteKind) -> Population:
    """One row for each case, every number moved away from where it starts: a new seed would be the identity."""
    cases = CASES[kind]
    population = make_population(kind, len(cases), (6, 5), dtype=torch.float32, **HOST[kind])
    perform(population, {r: [germinate(0, b, o), *to_fossilized(0)] for r, (b, o) in enumerate(cases)})
    with torch.no_grad():
        for number, bank in enumerate(population.banks):
            bank.theta += 0.3 * draw(number, *bank.theta.shape, dtype=population.dtype)
    return population


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("way", [torch.fx.symbolic_trace, torch.jit.script], ids=["fx", "script"])
@every_seed
def test_a_traced_network_gives_the_same_logits(kind, row, way):
    module = export_row(grown(kind), row)
    traced = way(module)
    # Neither may have kept the number of examples that it saw first.
    for batch in (3, 1, 8):
        x = draw(5, batch, *EXAMPLES[kind], dtype=torch.float32)
        assert torch.equal(traced(x), module(x))
