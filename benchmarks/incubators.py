"""How a seed is incubated: shadow against straight-through, by what the network is worth at the end of the run.

    python benchmarks/incubators.py [--starts 8]

One seed at the first site, germinated after a quarter of the run, in the incubator for a fixed number of decisions,
blended whatever its gain, committed, and trained with its host to the end. Gain when it leaves the incubator (how much
it would lower the reward-validation loss, by own batch statistics), and final gain: by how much the loss on the
selection split is below that of the same start without a seed. Paired by start.
"""

import argparse
import time

import torch
from common import report

from esper.kasmina.population import Population
from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op, Style
from esper.leyline.config import GateConfig, GrowthConfig, OptimizerConfig
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import evaluate, measure
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, Task, load_task
from esper.tolaria.training import Trainer

HORIZON, BORN, INCUBATED, UPDATES = 40, 10, 6, 20
"""Decisions of the run, before the seed and in the incubator; updates of each decision."""
OPEN = GateConfig(min_training_decisions=1, min_incubator_gain=-1e6, min_probation_decisions=1, min_contribution=-1e6)


def play(task: Task, blueprint: Blueprint | None, incubator: str, starts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gain on leaving the incubator and final loss of each start; the seed's seconds in the incubator go to `CLOCK`."""
    ids = torch.arange(starts)
    population = Population(task.host, GrowthConfig(gates=OPEN, incubator=incubator), 0, ids)
    order = BatchOrder(0, ids, len(task.data.train.y), 32)
    trainer = Trainer(population, task.data.train, order, OptimizerConfig(), HORIZON * UPDATES)
    gain_R = torch.zeros(starts)
    for decision in range(HORIZON):
        action = torch.zeros(starts, HEAD_COUNT, dtype=torch.int64)
        if blueprint is not None:
            action[:, Head.OP] = int(_operation(decision))
            if decision == BORN:
                action[:, Head.BLUEPRINT], action[:, Head.ALPHA_TARGET] = int(blueprint), 2
                action[:, Head.STYLE] = int(Style.LINEAR_ADD)
        population.decide(action, population.gate_report(torch.zeros(starts)))
        begin = time.process_time()
        trainer.run(UPDATES)
        if BORN < decision <= BORN + INCUBATED:
            CLOCK[incubator] = CLOCK.get(incubator, 0.0) + time.process_time() - begin
        measure(population, task.data.reward_validation)
        if decision == BORN + INCUBATED:
            gain_R = population.slots.incubator_gain[:, 0].clone()
    return gain_R, evaluate(population, task.data.selection).loss_R


CLOCK: dict[str, float] = {}


def _operation(decision: int) -> Op:
    """Germinate, incubate, blend over the shortest ramp, put on trial, commit."""
    age = decision - BORN
    if age == 0:
        return Op.GERMINATE
    return {1: Op.ADVANCE, INCUBATED + 1: Op.ADVANCE, INCUBATED + 4: Op.ADVANCE, INCUBATED + 5: Op.FOSSILIZE}.get(
        age, Op.WAIT
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=8)
    args = parser.parse_args()
    tune_process(1)
    rows = []
    for name in TASKS:
        task = load_task(name, "impaired")
        vector = name.endswith("-mlp")
        small, large = (Blueprint.LORA_SMALL, Blueprint.MLP_LARGE) if vector else (Blueprint.NORM, Blueprint.CONV_HEAVY)
        _, alone_R = play(task, None, "shadow", args.starts)
        for blueprint in (small, large):
            CLOCK.clear()
            gain, final = zip(
                *(play(task, blueprint, way, args.starts) for way in ("shadow", "straight-through")), strict=True
            )
            difference_R = final[1] - final[0]
            seconds = CLOCK["shadow"] / CLOCK["straight-through"]
            rows.append(
                {
                    "task": name,
                    "seed": blueprint.name.lower(),
                    "gain on leaving, shadow (nats)": round(gain[0].mean().item(), 3),
                    "straight-through": round(gain[1].mean().item(), 3),
                    "final gain, shadow (nats)": round((alone_R - final[0]).mean().item(), 4),
                    "straight-through ": round((alone_R - final[1]).mean().item(), 4),
                    "difference": round(difference_R.mean().item(), 4),
                    "standard error": round((difference_R.std() / args.starts**0.5).item(), 4),
                    "shadow better in": f"{int((difference_R > 0).sum())} of {args.starts}",
                    "seconds, shadow / straight-through": round(seconds, 2),
                }
            )
    report("incubators", rows, settings=vars(args))


if __name__ == "__main__":
    main()
