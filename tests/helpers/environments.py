"""Small growth environments, legal random actions, and scripts that read nothing but the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT, Op
from esper.leyline.config import ContextConfig, GovernorConfig, ObjectiveConfig
from esper.simic.environment import Environment, GrowthEnvironment, Payment, Situation
from esper.tamiyo.policy.action_masks import ActionMasks
from helpers.episodes import OPEN_GATES, run_config, task_of
from helpers.growing import FULL, Action

PLAIN = ContextConfig(prices=(0.05,), learning_rates=(0.005,), label_noise=(0.0,))
"""Groups differ in nothing but their start."""
ONWARD = (0.3, 2.0, 0.5, 0.3, 4.0, 4.0)
"""Weights of the operations under which seeds get far within a few decisions."""
READS = ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__")

Deed = Callable[[Situation], Tensor]


def environment(
    preset: str = "paired",
    *,
    task: str = "mnist1d-mlp",
    groups: int = 2,
    size: int = 3,
    horizon: int = 8,
    updates: int = 1,
    contexts: ContextConfig = PLAIN,
    gamma: float = 1.0,
    record: bool = False,
    seed: int = 0,
    governor: GovernorConfig | None = None,
    **objective: object,
) -> GrowthEnvironment:
    """A tiny one with open gates; `objective` as in `ObjectiveConfig`."""
    more = {"growth": OPEN_GATES, "governor": governor or GovernorConfig(), "seed": seed}
    config = run_config(task, horizon=horizon, updates=updates, batch=8, **more)
    paid = ObjectiveConfig.model_validate({"preset": preset, **objective})
    loaded = task_of(task, examples=40)
    return GrowthEnvironment(config, loaded, contexts, paid, groups=groups, size=size, gamma=gamma, record=record)


def legal_actions(
    masks: ActionMasks, generator: torch.Generator, weights: Iterable[float] = (1.0,) * len(Op)
) -> Tensor:
    """One random legal action [R, H] for each row."""

    def draw(mask: Tensor, weight: Tensor) -> Tensor:
        return torch.multinomial(mask.flatten(0, -2) * weight, 1, generator=generator).view(mask.shape[:-1])

    op_R = draw(masks.op_RO, torch.tensor(list(weights)))
    slot_R = draw(masks.slot_given(op_R), torch.ones(1))
    mask_RHC = masks.chosen(op_R, slot_R)
    action_RH = draw(mask_RHC, torch.ones(1))
    action_RH[:, 0], action_RH[:, 1] = op_R, slot_R
    return action_RH


def at_random(seed: int, weights: Iterable[float] = ONWARD) -> Deed:
    """Random legal actions for everybody."""
    generator, weights = torch.Generator().manual_seed(seed), tuple(weights)
    return lambda situation: legal_actions(situation.masks, generator, weights)


def onward(*slots: int, rows: Iterable[int], blueprint: int = 5, others: Deed | None = None) -> Deed:
    """Some rows bring the seeds of these slots to commitment as fast as gates allow; the others wait."""

    def deed(situation: Situation) -> Tensor:
        masks = situation.masks
        action_RH = (
            torch.zeros(len(masks.op_RO), HEAD_COUNT, dtype=torch.int64) if others is None else others(situation)
        )
        for row in rows:
            action_RH[row] = 0
            for slot in slots:
                ops = [o for o in (Op.FOSSILIZE, Op.ADVANCE, Op.GERMINATE) if masks.slot_ROS[row, int(o), slot]]
                if ops:
                    action_RH[row] = torch.tensor([int(ops[0]), slot, blueprint, 0, 0, FULL, 0, 0])
                    break
        return action_RH

    return deed


def script(rows: int, plans: dict[int, dict[int, Action]]) -> Deed:
    """Actions by row and decision; where there is none, WAIT."""
    decision = -1

    def deed(situation: Situation) -> Tensor:
        nonlocal decision
        decision += 1
        action_RH = torch.zeros(rows, HEAD_COUNT, dtype=torch.int64)
        for row, plan in plans.items():
            if decision in plan:
                action_RH[row] = torch.tensor(plan[decision])
        return action_RH

    return deed


def waits(situation: Situation) -> Tensor:
    """Everybody waits."""
    return torch.zeros(len(situation.masks.op_RO), HEAD_COUNT, dtype=torch.int64)


@dataclass(frozen=True)
class Played:
    """An episode that is over; D decisions, R rows."""

    payments: list[Payment]
    actions: list[Tensor]
    run_DRF: Tensor
    slot_DRSF: Tensor

    @property
    def reward_DR(self) -> Tensor:
        return torch.stack([payment.reward_R for payment in self.payments])

    @property
    def return_R(self) -> Tensor:
        """In double precision."""
        return self.reward_DR.double().sum(0)

    def part_DR(self, name: str) -> Tensor:
        return torch.stack([payment.parts[name] for payment in self.payments])


def play(
    environment: Environment,
    deed: Deed,
    number: int = 0,
    each: Callable[[int, Payment], None] = lambda decision, payment: None,
) -> Played:
    """One episode; `each` is told of every decision."""
    situation = environment.reset(number)
    payments, actions, runs, slots = [], [], [], []
    for decision in range(environment.horizon):
        runs.append(situation.observation.run_RF.clone())
        slots.append(situation.observation.slot_RSF.clone())
        actions.append(deed(situation))
        payments.append(environment.step(actions[-1]))
        each(decision, payments[-1])
        if not payments[-1].done:
            situation = environment.situation()
    return Played(payments, actions, torch.stack(runs), torch.stack(slots))


def reads_counted(monkeypatch) -> list[str]:
    """Note every place where a tensor becomes a Python value."""
    reads: list[str] = []

    def counted(name, whole):
        def call(self, *args, **kwargs):
            reads.append(name)
            return whole(self, *args, **kwargs)

        return call

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return reads
