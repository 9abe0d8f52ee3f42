"""A seed that is born late: the rate of its host, a constant one, or one of its own.

    python benchmarks/late_seeds.py [--starts 5]

One committed seed at the first site, standing from the start or planted at decision 20 or 40 of 60: how much lower the
test loss is than that of the same host alone, in nats, paired by start. No incubator, gate or ramp stands between, so
that nothing but the learning rate differs. The host follows the schedule of the run, but for "all 2x".

- host's: the seed has the host's rate at each update; constant: the peak all the time.
- own: what the trainer does (docs/decisions/0011); own 2x, 3x: so many times as fast, from the start on too.
- all 2x: hosts and seeds twice as fast, the host that stands alone as well.
"""

import argparse
from collections.abc import Callable

import torch
from common import report
from torch import Tensor

from esper.kasmina.population import Population
from esper.leyline.actions import Blueprint
from esper.leyline.config import RunConfig
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.schedule import Rates, rate_factor
from esper.tolaria.tasks import TASKS, load_task
from esper.tolaria.training import Trainer

BIRTHS = (0, 20, 40)
OWN, ALL_FASTER = "own", "all 2x"
MULTIPLES = {"host's": 1, "constant": 1, OWN: 1, "own 2x": 2, "own 3x": 3, ALL_FASTER: 2}
"""What is compared, and by how much it multiplies the rate of a seed."""
KINDS = list(MULTIPLES)
NEVER = -1
"""Birth of no seed."""


class Compared:
    """Rates as each row is to have them; those of hosts are as ever, but for "all 2x"."""

    def __init__(self, own: Rates, schedule_of: Callable[[int], float], host_N: Tensor, peak_N: Tensor, kind_N: Tensor):
        self.own, self.schedule_of, self.host_N, self.peak_N, self.kind_N = own, schedule_of, host_N, peak_N, kind_N
        self.times_N = torch.tensor([MULTIPLES[kind] for kind in KINDS])[kind_N]
        self.times_N[host_N & (kind_N != KINDS.index(ALL_FASTER))] = 1

    def at(self, update: int) -> Tensor:
        """See `Rates.at`."""
        own_N = self.own.at(update) * self.times_N
        own_N = torch.where(self.seeds("host's"), self.peak_N * self.schedule_of(update), own_N)
        return torch.where(self.seeds("constant"), self.peak_N, own_N)

    def seeds(self, kind: str) -> Tensor:
        """Seeds of the rows that compare this kind."""
        return (self.kind_N == KINDS.index(kind)) & ~self.host_N


class ComparingTrainer(Trainer):
    """Gives the seeds of each row the rates that are compared there."""

    kind_R: Tensor

    def _rates(self) -> Compared:
        banks = [bank for bank, _ in self.population.learning()]
        host_N = torch.cat([torch.full((len(bank),), bank is self.population.hosts) for bank in banks])
        row_N = torch.cat([bank.row_N for bank in banks])
        return Compared(
            super()._rates(),
            lambda update: rate_factor(update, self.total_updates, self.config),
            host_N,
            self.rate_R[row_N],
            self.kind_R[row_N],
        )


def gains(task_name: str, blueprint: Blueprint, starts: int) -> Tensor:
    """By how much the seed lowers the test loss [births, kinds, starts]."""
    task, config = load_task(task_name, "impaired"), RunConfig(task=task_name)
    # Rows: the hosts alone, at their rate and twice as fast, then every birth of every kind.
    kinds = [KINDS.index(OWN), KINDS.index(ALL_FASTER), *[k for _ in BIRTHS for k in range(len(KINDS))]]
    births = [NEVER, NEVER, *[birth for birth in BIRTHS for _ in KINDS]]
    ids = torch.arange(starts).repeat(len(kinds))
    kind_R, birth_R = (torch.tensor(values).repeat_interleave(starts) for values in (kinds, births))
    population = Population(task.host, config.growth, config.seed, ids)
    order = BatchOrder(config.seed, ids, len(task.data.train.y), config.training.batch_size)
    training = config.training
    updates = training.horizon * training.updates_per_decision
    trainer = ComparingTrainer(population, task.data.train, order, config.optimizer, updates)
    trainer.kind_R = kind_R
    for decision in range(training.horizon):
        if decision in BIRTHS:
            blueprint_RS = torch.full((len(ids), population.slots.slots), int(Blueprint.NOOP))
            blueprint_RS[birth_R == decision, 0] = int(blueprint)
            population.plant(blueprint_RS)
        trainer.run(training.updates_per_decision)
    loss_XK = evaluate(population, task.data.test).loss_R.view(-1, starts)
    lower = loss_XK[0] - loss_XK[2:].view(len(BIRTHS), len(KINDS), starts)
    lower[:, KINDS.index(ALL_FASTER)] += loss_XK[1] - loss_XK[0]
    return lower


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=5)
    args = parser.parse_args()
    tune_process(1)
    rows = []
    for task in TASKS:
        vector = task.endswith("-mlp")
        blueprint = Blueprint.MLP_LARGE if vector else Blueprint.CONV_HEAVY
        for birth, gain_KN in zip(BIRTHS, gains(task, blueprint, args.starts), strict=True):
            more_N = gain_KN[KINDS.index(OWN)] - gain_KN[KINDS.index("host's")]
            row = {"task": task, "seed": blueprint.name.lower(), "born at decision": birth}
            row |= {kind: f"{mean:+.3f}" for kind, mean in zip(KINDS, gain_KN.mean(1).tolist(), strict=True)}
            row["own less host's"] = f"{more_N.mean():+.3f} ± {more_N.std() / args.starts**0.5:.3f}"
            rows.append(row)
            print(*row.values(), flush=True)
    report("late_seeds", rows, settings=vars(args))


if __name__ == "__main__":
    main()
