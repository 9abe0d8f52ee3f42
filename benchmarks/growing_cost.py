"""What growing costs: a grown network against the same network trained from the start.

    python benchmarks/growing_cost.py [--starts 20] [--controller heuristic] [--tasks digits]

Impaired hosts, no price; every start grows its own shape. The controls of a start are made of the committed seeds of
its grown network (blueprints, operators, initial parameters), with the same initialisation, data order and updates:

- from the start: all seeds stand committed before the first update;
- at birth: each is planted, committed, at the decision at which the grown one germinated;
- when blended: each is planted at the decision at which the ramp of the grown one began.

Test loss (nats); differences paired by start, with standard errors; above 0, growing is worse. The whole cost is the
sum of its parts: late birth (at birth less from the start), delay (when blended less at birth: a seed in the incubator
is not in the network yet) and trial (grown less when blended: what the incubator taught the seed, the ramp, and what
seeds did that were culled).
"""

import argparse
from dataclasses import dataclass

import torch
from common import report
from torch import Tensor

from esper.kasmina.population import Population
from esper.leyline.actions import Blueprint
from esper.leyline.config import RunConfig
from esper.leyline.slots import SlotTensors
from esper.leyline.stages import BLENDED_STAGES, TERMINAL_STAGES, stage_table
from esper.simic.episode import Episode
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import evaluate
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task
from esper.tolaria.training import Trainer

NEVER = -1
"""Decision that does not come."""


@dataclass(frozen=True)
class Grown:
    """What grew: test loss [R], the final slots, and of each seed [R, S] when it germinated and when it was blended."""

    loss_R: Tensor
    slots: SlotTensors
    born_RS: Tensor
    blended_RS: Tensor

    @property
    def committed_RS(self) -> Tensor:
        """Bool: a seed that stays."""
        return stage_table(TERMINAL_STAGES)[self.slots.stage]


def grow(config: RunConfig, starts: int) -> Grown:
    """Let the controller grow a network from each start."""
    task = load_task(config.task, config.host)
    episode = Episode(config, task, config.controller, torch.arange(starts))
    slots = episode.population.slots
    born_RS, blended_RS = (torch.full_like(slots.stage, NEVER) for _ in range(2))
    in_network = stage_table(BLENDED_STAGES)
    while not episode.done:
        before = slots.seed_id.clone()
        episode.advance()
        new_RS = slots.seed_id != before
        born_RS[new_RS] = episode.decision - 1
        blended_RS[new_RS] = NEVER
        blended_RS[in_network[slots.stage] & (blended_RS == NEVER)] = episode.decision - 1
    episode.step()
    return Grown(evaluate(episode.population, task.data.test).loss_R, slots.clone(), born_RS, blended_RS)


def planted(config: RunConfig, grown: Grown, when_ARS: Tensor) -> Tensor:
    """Test loss [A, R] of each start, its committed seeds planted at decisions of their own; NEVER is none."""
    arms, starts, _ = when_ARS.shape
    when_NS = when_ARS.flatten(0, 1)
    task, training = load_task(config.task, config.host), config.training
    ids = torch.arange(starts).repeat(arms)
    population = Population(task.host, config.growth, config.seed, ids)
    order = BatchOrder(config.seed, ids, len(task.data.train.y), training.batch_size)
    updates = training.horizon * training.updates_per_decision
    trainer = Trainer(population, task.data.train, order, config.optimizer, updates)
    blueprint, operator, seed_id = (
        getattr(grown.slots, name).repeat(arms, 1) for name in ("blueprint", "operator", "seed_id")
    )
    committed_NS = grown.committed_RS.repeat(arms, 1)
    for decision in range(training.horizon):
        now_NS = committed_NS & (when_NS == decision)
        if now_NS.any():
            noop = int(Blueprint.NOOP)
            population.plant(blueprint.where(now_NS, noop), operator_RS=operator, seed_id_RS=seed_id)
        trainer.run(training.updates_per_decision)
    return evaluate(population, task.data.test).loss_R.view(arms, starts)


def said(difference_R: Tensor) -> str:
    """Mean and standard error."""
    return f"{difference_R.mean():+.3f} ± {difference_R.std() / len(difference_R) ** 0.5:.3f}"


def compared(config: RunConfig, starts: int) -> dict[str, object]:
    """One line of the table."""
    grown = grow(config, starts)
    never_RS, start_RS = torch.full_like(grown.born_RS, NEVER), torch.zeros_like(grown.born_RS)
    loss_AR = planted(config, grown, torch.stack([never_RS, start_RS, grown.born_RS, grown.blended_RS]))
    host_R, from_start_R, at_birth_R, when_blended_R = loss_AR
    committed_RS = grown.committed_RS
    return {
        "task": config.task,
        "host alone": f"{host_R.mean():.3f}",
        "from the start": f"{from_start_R.mean():.3f}",
        "grown": f"{grown.loss_R.mean():.3f}",
        "cost": said(grown.loss_R - from_start_R),
        "late birth": said(at_birth_R - from_start_R),
        "delay": said(when_blended_R - at_birth_R),
        "trial": said(grown.loss_R - when_blended_R),
        "seeds": round(committed_RS.sum(1).float().mean().item(), 2),
        "born at decision": round(grown.born_RS[committed_RS].float().mean().item(), 1),
        "blended at": round(grown.blended_RS[committed_RS].float().mean().item(), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--controller", default="heuristic")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    args = parser.parse_args()
    tune_process(1)
    rows = []
    for task in args.tasks:
        rows.append(compared(RunConfig(task=task, controller=args.controller), args.starts))
        print(*rows[-1].values(), flush=True)
    report("growing_cost", rows, settings=vars(args))


if __name__ == "__main__":
    main()
