"""A population in one pass against a loop over separate torch modules: forward + backward + AdamW.

    python benchmarks/population.py [--rows 64] [--batch 32] [--repeats 15]

The loop runs the exported plain modules of the very same rows, each with its own fused AdamW and without the clipping
and the non-finite guard that the population's optimizer includes. Both sides take turns in one process.
"""

import argparse

import torch
import torch.nn.functional as F
from common import alternate, report
from torch import Tensor, nn

from esper.kasmina.export import export_row
from esper.kasmina.hosts import Host
from esper.kasmina.optim import RowOptimizer
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint, SiteKind
from esper.leyline.config import GrowthConfig, HostConfig, OptimizerConfig
from esper.tolaria.machine import tune_process
from esper.tolaria.training import example_losses

HOSTS = {
    "CNN on 8x8": (
        HostConfig(kind=SiteKind.IMAGE, widths=(8, 8, 8), norm="batch", pooling="average"),
        (1, 8, 8),
        {False: 6.0, True: 4.5},
    ),
    "CNN on 8x8, twice as wide": (
        HostConfig(kind=SiteKind.IMAGE, widths=(8, 16, 16), norm="batch", pooling="average"),
        (1, 8, 8),
        {False: 6.0, True: 4.5},
    ),
    "MLP": (HostConfig(kind=SiteKind.VECTOR, widths=(32, 32, 32)), (64,), {False: 4.5, True: 3.0}),
}
FILLED = 0.6
"""Share of slots that hold a seed in the filled variant."""


def make_population(host: HostConfig, example: tuple[int, ...], rows: int, *, filled: bool) -> Population:
    """A population; if filled, every blueprint that fits in turn, spread over 60 % of the slots."""
    population = Population(Host(host, example, 10), GrowthConfig(), 0, torch.arange(rows))
    if filled:
        blueprint_RS = torch.zeros(rows, population.slots.slots, dtype=torch.int64)
        flat = blueprint_RS.view(-1)
        places = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))[: round(FILLED * len(flat))]
        fitting = torch.tensor([b for b in Blueprint if population.fits_SB[0, b]])
        flat[places] = fitting[torch.arange(len(places)) % len(fitting)]
        population.plant(blueprint_RS)
    return population


def population_update(population: Population, x: Tensor, y: Tensor) -> None:
    """One update as the trainer makes it."""
    logits, _ = population.forward(x, population.training_pass, statistics=Statistics.UPDATED)
    loss = example_losses(logits, y).mean(1).sum()
    banks, active = zip(*population.learning(), strict=True)
    grads = torch.autograd.grad(loss, [bank.theta for bank in banks])
    rates = [torch.full((len(bank),), RATE) for bank in banks]
    OPTIMIZER.step(banks, grads, rates, active)


def loop_update(modules: list[nn.Module], optimizers: list[torch.optim.Optimizer], x: list[Tensor], y: Tensor) -> None:
    """The same, one module after the other."""
    for module, optimizer, x_row, y_row in zip(modules, optimizers, x, y, strict=True):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(module(x_row), y_row).backward()
        optimizer.step()


OPTIMIZER = RowOptimizer(OptimizerConfig())
RATE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tune_process(args.threads)
    rows = []
    for name, (config, example, targets) in HOSTS.items():
        for filled in (False, True):
            population = make_population(config, example, args.rows, filled=filled)
            x = torch.randn(args.rows, args.batch, *example)
            y = torch.randint(0, 10, (args.rows, args.batch))
            laid = x if population.lane_axis == 0 else x.transpose(0, 1).flatten(1, 2)
            modules = [export_row(population, r).train() for r in range(args.rows)]
            optimizers = [torch.optim.AdamW(m.parameters(), lr=RATE, fused=True) for m in modules]
            examples = list(x)
            taken = alternate(
                {
                    "loop": lambda m=modules, o=optimizers, e=examples, t=y: loop_update(m, o, e, t),
                    "population": lambda p=population, e=laid, t=y: population_update(p, e, t),
                },
                args.repeats,
            )
            ratio = taken["loop"] / taken["population"]
            rows.append(
                {
                    "host": name,
                    "seeds": "60 % of slots" if filled else "none",
                    "loop (ms)": round(1e3 * taken["loop"], 1),
                    "population (ms)": round(1e3 * taken["population"], 1),
                    "times": round(ratio, 2),
                    "at least": targets[filled],
                    "reached": ratio >= targets[filled],
                }
            )
    report("population", rows, settings=vars(args))


if __name__ == "__main__":
    main()
