"""What changing the operator of a blended seed would do to the network at once (docs/decisions/0002).

    python benchmarks/operator_jump.py [--rows 8]

Networks grown by the heuristic; each committed seed is re-read as MULTIPLY instead of ADD, all else unchanged.
"""

import argparse

import torch
from common import report

from esper.leyline.actions import Operator
from esper.leyline.config import RunConfig
from esper.simic.episode import Episode
from esper.tolaria.evaluation import evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    args = parser.parse_args()
    tune_process(1)
    rows = []
    for name in TASKS:
        episode = Episode(RunConfig(task=name), load_task(name, "impaired"), "heuristic", torch.arange(args.rows))
        while not episode.done:
            episode.advance()
        population, split = episode.population, episode.task.data.reward_validation
        before = evaluate(population, split).loss_R
        blended = torch.from_numpy(population.base)
        population.slots.operator[blended] = int(Operator.MULTIPLY)
        population.settle()
        jump = evaluate(population, split).loss_R - before
        rows.append(
            {
                "task": name,
                "committed seeds": int(blended.sum()),
                "loss before (nats)": round(before.mean().item(), 3),
                "mean jump (nats)": round(jump.mean().item(), 3),
                "smallest": round(jump.min().item(), 3),
                "largest": round(jump.max().item(), 3),
            }
        )
    report("operator_jump", rows, settings=vars(args))


if __name__ == "__main__":
    main()
