"""Kernels launched by one update: they must not grow with the number of rows.

    python benchmarks/kernels.py [--small 4] [--large 256]

Counts operators that compute (views are free) in forward, backward and optimizer, with every fitting blueprint
present at every site in both populations.
"""

import argparse

import torch
from common import report
from population import HOSTS, population_update
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.leyline.actions import Blueprint
from esper.leyline.config import GrowthConfig, HostConfig

LIMIT = 1.05


class CountKernels(TorchDispatchMode):
    """Counts dispatched operators that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def kernels(host: HostConfig, example: tuple[int, ...], rows: int, blueprints: list[Blueprint], batch: int) -> int:
    """Kernels of one update with `blueprints` spread over the rows of every site."""
    population = Population(Host(host, example, 10), GrowthConfig(), 0, torch.arange(rows))
    slots = population.slots.slots
    turn_RS = torch.arange(rows)[:, None] + torch.arange(slots)
    population.plant(torch.tensor([int(b) for b in blueprints])[turn_RS % len(blueprints)])
    x = torch.randn(rows, batch, *example)
    laid = x if population.lane_axis == 0 else x.transpose(0, 1).flatten(1, 2)
    with CountKernels() as counter:
        population_update(population, laid, torch.randint(0, 10, (rows, batch)))
    return counter.count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", type=int, default=4)
    parser.add_argument("--large", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    args = parser.parse_args()
    rows = []
    for name, (config, example, _) in HOSTS.items():
        fits = Population(Host(config, example, 10), GrowthConfig(), 0, torch.arange(1)).fits_SB[0]
        present = [b for b in Blueprint if fits[b]][: args.small]
        small = kernels(config, example, args.small, present, args.batch)
        large = kernels(config, example, args.large, present, args.batch)
        rows.append(
            {
                "host": name,
                f"kernels, {args.small} rows": small,
                f"kernels, {args.large} rows": large,
                "times": round(large / small, 3),
                "at most": LIMIT,
                "reached": large <= LIMIT * small,
            }
        )
    report("kernels", rows, settings=vars(args))


if __name__ == "__main__":
    main()
