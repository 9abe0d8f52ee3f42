"""What a seed is measured to be worth, by the batch statistics of which network: against estimating them all again.

    python benchmarks/contributions.py [--rows 24]

Hosts with batch norm, grown by the clock; at the end every set of each row's seeds is evaluated three times on
reward-validation: with statistics estimated again for that very network (120 passes over training examples; what it
would have if it were deployed), with the running ones that were fitted with all seeds in place, and with the batch
statistics of the evaluated examples, as `measure` does. A contribution is the loss without a seed less the loss with
it; a coalition is any set of a row's seeds. Errors are absolute, against statistics estimated again.
"""

import argparse

import numpy as np
import torch
from common import report
from scipy.stats import spearmanr

from esper.kasmina.plan import Pass
from esper.kasmina.population import Population
from esper.kasmina.rows.core import Statistics
from esper.leyline.config import RunConfig
from esper.simic.contexts import Contexts
from esper.simic.episode import Episode
from esper.tolaria.batches import gather, shared
from esper.tolaria.datasets import Dataset, Split
from esper.tolaria.evaluation import coalition_losses
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import load_task
from esper.tolaria.training import example_losses

TASKS = ("digits", "mnist1d", "digits-mlp")
PASSES, EXAMPLES = 120, 128
"""Passes of a new estimate, and training examples in each: with momentum 0.1 nothing is left of the old one."""


def grown(task_name: str, rows: int, decisions: int) -> tuple[Population, Dataset]:
    """A population that the clock has grown, its seeds still in place."""
    config = RunConfig(task=task_name)
    task = load_task(task_name, "impaired")
    ids_R = torch.arange(rows)
    episode = Episode(config, task, "periodic", ids_R, contexts=Contexts.alone(config, ids_R, 0.0))
    for _ in range(decisions):
        episode.advance()
    return episode.population, task.data


@torch.no_grad()
def loss_of(population: Population, steps: Pass, split: Split) -> torch.Tensor:
    """Loss of each row [R] under its running statistics."""
    x = shared(split.x, population.rows, population.lane_axis)
    logits, _ = population.forward(x, steps, statistics=Statistics.RUNNING)
    return example_losses(logits, split.y.expand(population.rows, -1)).mean(1)


@torch.no_grad()
def loss_estimated_again(population: Population, steps: Pass, data: Dataset) -> torch.Tensor:
    """The same under statistics of this very network; the old ones are put back."""
    before = [buffer.clone() for buffer in population.hosts.buffers]
    generator = torch.Generator().manual_seed(0)
    for _ in range(PASSES):
        index_RB = torch.randint(len(data.train.y), (population.rows, EXAMPLES), generator=generator)
        x = gather(data.train.x, index_RB, population.lane_axis)
        population.forward(x, steps, statistics=Statistics.UPDATED)
    loss_R = loss_of(population, steps, data.reward_validation)
    for buffer, old in zip(population.hosts.buffers, before, strict=True):
        buffer.copy_(old)
    return loss_R


def row_of(task: str, what: str, ways: dict[str, np.ndarray]) -> dict[str, object]:
    """One line of the table: errors and rank correlations against `again`."""
    again = ways["again"]
    error = {name: np.abs(values - again).mean() for name, values in ways.items()}
    rank = {name: spearmanr(values, again).statistic for name, values in ways.items()}
    return {
        "task": task,
        "of": what,
        "measured": len(again),
        "mean (nats)": round(float(again.mean()), 3),
        "error, running statistics": round(float(error["running"]), 3),
        "error, own": round(float(error["own"]), 4),
        "at most": 0.1,
        "rank correlation, running": round(float(rank["running"]), 3),
        "rank correlation, own": round(float(rank["own"]), 3),
        "at least": 0.97,
        "reached": bool(error["own"] < 0.1 and rank["own"] > 0.97),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--decisions", type=int, default=50)
    args = parser.parse_args()
    tune_process(1)
    table = []
    for task in TASKS:
        population, data = grown(task, args.rows, args.decisions)
        base_RS = population.base
        slots = base_RS.shape[1]
        masks_MS = (np.arange(2**slots)[:, None] >> np.arange(slots) & 1).astype(bool)
        every = np.arange(population.rows)
        losses: dict[str, list[np.ndarray]] = {"again": [], "running": [], "own": []}
        for mask_S in masks_MS:
            enabled_RS = base_RS & mask_S
            steps = population.planner.main(enabled_RS)
            losses["again"].append(loss_estimated_again(population, steps, data).numpy())
            losses["running"].append(loss_of(population, steps, data.reward_validation).numpy())
            losses["own"].append(coalition_losses(population, data.reward_validation, every, enabled_RS).numpy())
        loss = {name: np.stack(of_mask) for name, of_mask in losses.items()}
        # A set that lacks a slot in which there is nothing is the same set again.
        distinct_MR = ((base_RS[None] & masks_MS[:, None]) == masks_MS[:, None]).all(2)
        whole = (base_RS * 2 ** np.arange(slots)).sum(1)
        row, slot = np.nonzero(base_RS)
        worth = {name: l_MR[whole[row] - 2**slot, row] - l_MR[whole[row], row] for name, l_MR in loss.items()}
        table.append(row_of(task, "contributions", worth))
        table.append(row_of(task, "coalitions", {name: l_MR[distinct_MR] for name, l_MR in loss.items()}))
    report("contributions", table, settings=vars(args))


if __name__ == "__main__":
    main()
