"""Leave-one-out contributions of all live seeds against separate evaluations, one more than there are seeds.

    python benchmarks/contributions.py [--rows 64]

The separate evaluations run the same engine on the whole coalition and on each coalition without one seed; sharing
the activations in front of each slot is all that differs. Both sides give the same losses, which is checked.

Where all segments cost the same, three seeds cannot come below 12/21 = 0.57: the whole pass and the rests behind each
slot against four passes less a seed each. Hosts whose later segments are cheaper, such as pooled ones, can.
"""

import argparse

import torch
from common import alternate, report
from population import HOSTS

from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint
from esper.leyline.config import GrowthConfig, HostConfig
from esper.tolaria.batches import shared
from esper.tolaria.datasets import DATASETS
from esper.tolaria.evaluation import CHUNK, measure
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, shaped
from esper.tolaria.training import example_losses

LIMIT = 0.55


def hosts() -> dict[str, HostConfig]:
    """Hosts with three sites: the impaired ones that runs start from, and the speed benchmark's own."""
    impaired = {f"{name}, impaired": task.impaired for name, task in TASKS.items() if task.dataset == "digits"}
    return impaired | {name: config for name, (config, _, _) in HOSTS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tune_process(args.threads)
    rows = []
    for name, config in hosts().items():
        data = shaped(DATASETS["digits"](0), config)
        split = data.reward_validation
        host = Host(config, tuple(split.x.shape[1:]), data.classes)
        population = Population(host, GrowthConfig(), 0, torch.arange(args.rows))
        slots = population.slots.slots
        fitting = torch.tensor([b for b in Blueprint if population.fits_SB[0, b]])
        population.plant(fitting[(torch.arange(args.rows)[:, None] + torch.arange(slots)) % len(fitting)])
        coalitions = [population.base]
        for s in range(slots):
            coalitions.append(population.base.copy())
            coalitions[-1][:, s] = False
        passes = [population.planner.main(enabled) for enabled in coalitions]

        @torch.no_grad()
        def separate(population=population, passes=passes, split=split) -> list[torch.Tensor]:
            means = []
            for steps in passes:
                losses = []
                for start in range(0, len(split.y), CHUNK):
                    x = shared(split.x[start : start + CHUNK], population.rows, population.lane_axis)
                    y = split.y[start : start + CHUNK].expand(population.rows, -1)
                    logits, _ = population.forward(x, steps, statistics=Statistics.RUNNING)
                    losses.append(example_losses(logits, y))
                means.append(torch.cat(losses, 1).mean(1))
            return means

        def together(population=population, split=split) -> None:
            measure(population, split)

        together()
        whole, *without = separate()
        torch.testing.assert_close(
            population.slots.contribution, torch.stack([w - whole for w in without], 1), atol=1e-5, rtol=1e-4
        )
        taken = alternate({"separate": separate, "together": together}, args.repeats)
        ratio = taken["together"] / taken["separate"]
        rows.append(
            {
                "host": name,
                "live seeds of a row": slots,
                "separate evaluations (ms)": round(1e3 * taken["separate"], 1),
                "leave-one-out (ms)": round(1e3 * taken["together"], 1),
                "share": round(ratio, 3),
                "at most": LIMIT,
                "reached": ratio <= LIMIT,
            }
        )
    report("contributions", rows, settings=vars(args))


if __name__ == "__main__":
    main()
