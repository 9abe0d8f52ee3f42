"""Room to grow: each task's host alone against the same host filled with seeds from the start.

    python benchmarks/headroom.py [--seeds 5] [--updates 1200]

Accuracy on the selection split after the same number of updates with the same data order. "Impaired" means that
growing clearly pays: at least 5 points.
"""

import argparse

import torch
from common import report

from esper.kasmina.population import Population
from esper.leyline.config import RunConfig
from esper.simic.episode import STATIC_BLUEPRINT
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task
from esper.tolaria.training import Trainer


def run(task_name: str, which: str, seeds: int, updates: int) -> dict[str, object]:
    """Train `seeds` pairs (host alone, host filled) in one population."""
    config = RunConfig(task=task_name, host=which)
    task = load_task(task_name, which)
    ids = torch.arange(seeds).repeat(2)
    population = Population(task.host, config.growth, config.seed, ids)
    alone_parameters = population.hosts.layer.parameter_count
    blueprint_RS = torch.full((2 * seeds, population.slots.slots), int(STATIC_BLUEPRINT[task.host.kind]))
    blueprint_RS[:seeds] = 0
    population.plant(blueprint_RS)
    order = BatchOrder(config.seed, ids, len(task.data.train.y), config.training.batch_size)
    Trainer(population, task.data.train, order, config.optimizer, updates).run(updates)
    accuracy = evaluate(population, task.data.selection).accuracy_R
    alone, filled = accuracy[:seeds], accuracy[seeds:]
    gain = filled - alone
    return {
        "task": task_name,
        "host": which,
        "parameters alone": alone_parameters,
        "parameters filled": alone_parameters + int(population.slots.parameters[-1].sum()),
        "alone": round(alone.mean().item(), 3),
        "filled": round(filled.mean().item(), 3),
        "gain by seed (points)": " ".join(f"{100 * g:+.1f}" for g in gain.tolist()),
        "mean gain (points)": round(100 * gain.mean().item(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    defaults = RunConfig().training
    parser.add_argument("--updates", type=int, default=defaults.horizon * defaults.updates_per_decision)
    args = parser.parse_args()
    tune_process(1)
    rows = [run(name, which, args.seeds, args.updates) for name in TASKS for which in ("impaired", "ample")]
    report("headroom", rows, settings=vars(args))


if __name__ == "__main__":
    main()
