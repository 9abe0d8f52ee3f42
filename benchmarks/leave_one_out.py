"""Leave-one-out contributions of all live seeds against separate evaluations, one more than there are seeds.

    python benchmarks/leave_one_out.py [--rows 64]

The separate evaluations run the same engine on the whole coalition and on each coalition without one seed; sharing
the activations in front of each slot is all that differs. Both sides give the same losses, which is checked. Where
there are batch norms, both evaluate the whole a second time: once with own statistics for the differences, once with
running ones for the loss of the network.

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

        chunks = -(-len(split.y) // CHUNK)
        parts = list(zip(split.x.tensor_split(chunks), split.y.tensor_split(chunks), strict=True))

        @torch.no_grad()
        def separate(population=population, passes=passes, parts=parts) -> list[torch.Tensor]:
            means = []
            running = [(population.main_pass, Statistics.RUNNING)] if population.hosts.buffers else []
            for steps, statistics in [*((steps, Statistics.OWN) for steps in passes), *running]:
                losses = []
                for x, y in parts:
                    x = shared(x, population.rows, population.lane_axis)
                    logits, _ = population.forward(x, steps, statistics=statistics)
                    losses.append(example_losses(logits, y.expand(population.rows, -1)))
                means.append(torch.cat(losses, 1).mean(1))
            return means[: len(passes)]

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
    report("leave_one_out", rows, settings=vars(args))


if __name__ == "__main__":
    main()
