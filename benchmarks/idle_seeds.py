"""A seed that does nothing: how often G5 commits it over a life on trial, by the asked standard errors.

    python benchmarks/idle_seeds.py [--rows 200]

Every row gets one such seed, in a slot in front of a layer with its norm, by turns. It is blended and stands on trial
for as long as the heuristic would keep it, while the host goes on learning. G5 asks at every decision from its earliest
on; a life counts as committed if any of these tests passes. Two kinds. *Constant*: adds 2 to every feature, which
computes nothing in front of a batch norm; a host without one gets seeds that stay at the identity. *Noise*: adds a
little normal noise, drawn anew in training, so that the host cannot learn to need it, and the same for an example
whenever it is evaluated: it is worth nothing but by the luck of the sample, and the tests of one life are alike.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch
from common import report
from torch import Tensor

from esper.kasmina.banks import Bank
from esper.kasmina.blending import SiteModules
from esper.kasmina.plan import Call
from esper.kasmina.population import Population
from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op
from esper.leyline.config import GateConfig, GrowthConfig, OptimizerConfig
from esper.leyline.stages import Stage
from esper.tolaria.batches import BatchOrder
from esper.tolaria.evaluation import measure
from esper.tolaria.machine import tune_process
from esper.tolaria.tasks import TASKS, load_task
from esper.tolaria.training import Trainer

BORN, TRIAL, UPDATES, HORIZON = 20, 8, 20, 60
"""Decisions before the seed and on trial; updates of a decision; decisions of the learning rate's curve."""
SCALE = 0.05
"""Standard deviation of the noise."""
MULTIPLES = (-2.0, 0.0, 1.0, 2.0, 3.0)


class Idle(Population):
    """Only the hosts learn, and seeds add what is asked."""

    kind = "constant"

    def learning(self) -> Iterator[tuple[Bank, Tensor | None]]:
        yield self.hosts, None

    def _modules(self, *, live: bool) -> SiteModules:
        def delta(call: Call, x: Tensor) -> Tensor:
            if self.kind == "constant":
                return torch.full_like(x, 2.0 if self.hosts.buffers else 0.0)
            generator = None if torch.is_grad_enabled() else torch.Generator().manual_seed(call.key[0])
            return SCALE * torch.randn(x.shape, generator=generator)

        return replace(super()._modules(live=live), delta=delta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    args = parser.parse_args()
    tune_process(1)
    table = []
    for name, kind in product(TASKS, ("constant", "noise")):
        task = load_task(name, "impaired")
        ids = torch.arange(args.rows)
        population = Idle(task.host, GrowthConfig(), 0, ids)
        population.kind = kind
        trainer = Trainer(
            population,
            task.data.train,
            BatchOrder(0, ids, len(task.data.train.y), 32),
            OptimizerConfig(),
            HORIZON * UPDATES,
        )
        slots = population.slots
        # Behind the last slot stands the head, which has no norm.
        slot_R = ids % (slots.slots - 1)
        trainer.run(BORN * UPDATES)
        measure(population, task.data.reward_validation)
        ramp = [Op.ADVANCE, Op.ADVANCE, Op.WAIT, Op.WAIT, Op.ADVANCE]
        passed_MR = torch.zeros(len(MULTIPLES), args.rows, dtype=torch.bool)
        tests = 0
        for age, op in enumerate([Op.GERMINATE, *ramp, *[Op.WAIT] * TRIAL]):
            action = torch.zeros(args.rows, HEAD_COUNT, dtype=torch.int64)
            action[:, Head.OP] = int(op)
            if op is not Op.WAIT:
                action[:, Head.SLOT] = slot_R
            if op is Op.GERMINATE:
                action[:, Head.BLUEPRINT], action[:, Head.ALPHA_TARGET] = int(Blueprint.NORM), 2
            gates = population.gate_report(torch.zeros(args.rows))
            # It has no gradient that could pass G2; the ramp is waited for.
            gates = replace(gates, passed_CRS=torch.ones_like(gates.passed_CRS))
            outcome, _ = population.decide(action, gates)
            if not outcome.accepted.all():
                raise RuntimeError(f"refused at age {age}: {outcome.refused_by.tolist()}")
            trainer.run(UPDATES)
            measure(population, task.data.reward_validation)
            on_trial = slots.stage[ids, slot_R] == int(Stage.PROBATIONARY)
            age_R = slots.stage_age[ids, slot_R]
            if not (on_trial & (age_R >= GateConfig().min_probation_decisions)).all():
                continue
            tests += 1
            worth_R = slots.contribution[ids, slot_R]
            error_R = slots.contribution_se[ids, slot_R]
            for number, multiple in enumerate(MULTIPLES):
                passed_MR[number] |= worth_R > multiple * error_R
        table.append(
            {
                "task": name,
                "seed": kind,
                "lives": args.rows,
                "tests in a life": tests,
                **{
                    f"committed at {multiple:+g} errors": f"{100 * passed_MR[number].float().mean():.1f} %"
                    for number, multiple in enumerate(MULTIPLES)
                },
                "at most": "5 % at +2",
                "reached": bool(passed_MR[MULTIPLES.index(2.0)].float().mean() < 0.05),
            }
        )
        print(table[-1], flush=True)
    report("idle_seeds", table, settings=vars(args))


if __name__ == "__main__":
    main()
