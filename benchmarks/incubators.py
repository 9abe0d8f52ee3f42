"""Shadow against straight-through incubation: what a seed has learned when it leaves the incubator.

    python benchmarks/incubators.py [--seeds 8]

One seed at the first site, germinated after a short warm-up, trained in the incubator for some decisions: its gain
(how much it would lower the reward-validation loss if blended at its target), with shadow and with straight-through
incubation, same host, same data, paired by seed. Then the seconds of the same updates.
"""

import argparse
import time

import torch
from common import report

from esper.kasmina.population import Population
from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op, Style
from esper.leyline.config import GrowthConfig, OptimizerConfig
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import measure
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task
from esper.tolaria.training import Trainer

WARM_UP, INCUBATED, UPDATES = 10, 6, 20
"""Decisions before the seed, decisions in the incubator, updates of each decision."""


def gains(task_name: str, blueprint: Blueprint, incubator: str, seeds: int) -> tuple[torch.Tensor, float]:
    """Incubator gain (nats) of each row's seed, and the seconds of the incubation."""
    task = load_task(task_name, "impaired")
    ids = torch.arange(seeds)
    population = Population(task.host, GrowthConfig(incubator=incubator), 0, ids)
    order = BatchOrder(0, ids, len(task.data.train.y), 32)
    trainer = Trainer(population, task.data.train, order, OptimizerConfig(), 2 * (WARM_UP + INCUBATED) * UPDATES)
    trainer.run(WARM_UP * UPDATES)
    loss_R = measure(population, task.data.reward_validation).loss_R
    action = torch.zeros(seeds, HEAD_COUNT, dtype=torch.int64)
    action[:, Head.OP], action[:, Head.BLUEPRINT] = int(Op.GERMINATE), int(blueprint)
    action[:, Head.STYLE], action[:, Head.ALPHA_TARGET] = int(Style.LINEAR_ADD), 2
    population.decide(action, population.gate_report(loss_R))
    action[:, Head.OP] = int(Op.ADVANCE)
    population.decide(action, population.gate_report(loss_R))
    start = time.perf_counter()
    trainer.run(INCUBATED * UPDATES)
    seconds = time.perf_counter() - start
    measure(population, task.data.reward_validation)
    return population.slots.incubator_gain[:, 0].clone(), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    tune_process(1)
    rows = []
    for task in TASKS:
        vector = task.endswith("-mlp")
        small, large = (Blueprint.LORA_SMALL, Blueprint.MLP_LARGE) if vector else (Blueprint.NORM, Blueprint.CONV_HEAVY)
        for blueprint in (small, large):
            shadow, shadow_seconds = gains(task, blueprint, "shadow", args.seeds)
            straight, straight_seconds = gains(task, blueprint, "straight-through", args.seeds)
            difference = shadow - straight
            rows.append(
                {
                    "task": task,
                    "seed": blueprint.name.lower(),
                    "gain, shadow (nats)": round(shadow.mean().item(), 3),
                    "gain, straight-through (nats)": round(straight.mean().item(), 3),
                    "difference": round(difference.mean().item(), 3),
                    "standard error": round((difference.std() / args.seeds**0.5).item(), 3),
                    "shadow better in": f"{int((difference > 0).sum())} of {args.seeds}",
                    "seconds, shadow / straight-through": round(shadow_seconds / straight_seconds, 2),
                }
            )
    report("incubators", rows, settings=vars(args))


if __name__ == "__main__":
    main()
