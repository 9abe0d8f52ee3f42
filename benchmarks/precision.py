"""What bfloat16 does to training, and what it would do to measuring, which stays float32.

    python benchmarks/precision.py [--rows 11] [--updates 200]

Rows of the impaired hosts with three live seeds each, trained in either precision from the same start. Then the
contribution of every seed is measured twice, in float32 and as it would come out in bfloat16, batch statistics its own.
"""

import argparse

import torch
from common import report
from torch import Tensor

from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.actions import Blueprint
from esper.leyline.config import GrowthConfig, OptimizerConfig
from esper.tolaria.batches import BatchOrder, shared
from esper.tolaria.datasets import Split
from esper.tolaria.evaluation import CHUNK, evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, Task, load_task
from esper.tolaria.training import Trainer, example_losses


def trained(task: Task, rows: int, updates: int, precision: torch.dtype | None) -> Population:
    """A population after its updates."""
    ids = torch.arange(rows)
    population = Population(task.host, GrowthConfig(), 0, ids)
    fitting = torch.tensor([b for b in Blueprint if population.fits_SB[0, b]])
    slots = torch.arange(population.slots.slots)
    population.plant(fitting[(ids[:, None] + slots) % len(fitting)])
    order = BatchOrder(0, ids, len(task.data.train.y), 32)
    trainer = Trainer(population, task.data.train, order, OptimizerConfig(), updates, precision=precision)
    trainer.run(updates)
    return population


@torch.no_grad()
def worths(population: Population, split: Split, dtype: torch.dtype) -> Tensor:
    """Loss of each example without each seed less with all [S, R, E], computed in `dtype`."""
    tables, sites = population.tables(dtype), population.slots.slots
    losses = []
    for left_out in (None, *range(sites)):
        enabled = population.base.copy()
        if left_out is not None:
            enabled[:, left_out] = False
        steps = population.planner.main(enabled)
        parts = []
        for start in range(0, len(split.y), CHUNK):
            x = shared(split.x[start : start + CHUNK], population.rows, population.lane_axis).to(dtype)
            logits, _ = population.forward(x, steps, statistics=Statistics.OWN, tables=tables)
            parts.append(example_losses(logits, split.y[start : start + CHUNK].expand(population.rows, -1)))
        losses.append(torch.cat(parts, 1))
    return torch.stack(losses[1:]) - losses[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=11)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    tune_process(args.threads)
    rows = []
    for name in TASKS:
        task = load_task(name, "impaired")
        split = task.data.reward_validation
        exact = trained(task, args.rows, args.updates, None)
        mixed = trained(task, args.rows, args.updates, torch.bfloat16)
        difference_R = evaluate(mixed, task.data.test).loss_R - evaluate(exact, task.data.test).loss_R
        fine, coarse = (worths(exact, split, dtype) for dtype in (torch.float32, torch.bfloat16))
        error = fine.std(2) / fine.shape[2] ** 0.5
        shift = (coarse.mean(2) - fine.mean(2)).abs()
        small = fine.mean(2).abs() < 2 * error
        rows.append(
            {
                "task": name,
                "test loss (nats)": round(evaluate(exact, task.data.test).loss_R.mean().item(), 3),
                "bfloat16 adds (nats)": round(difference_R.mean().item(), 4),
                "its standard error": round((difference_R.std() / args.rows**0.5).item(), 4),
                "shift of a contribution in standard errors, median": round((shift / error).median().item(), 2),
                "largest": round((shift / error).max().item(), 1),
                "largest of seeds worth nothing": round((shift / error)[small].max().item(), 1)
                if small.any()
                else None,
            }
        )
    report("precision", rows, settings=vars(args))


if __name__ == "__main__":
    main()
