"""Faults of single rows, put into growth environments while they play, and the state of a row bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.slots import EMPTY_SLOT
from esper.leyline.stages import Stage
from esper.simic.environment import GrowthEnvironment, Situation
from esper.tolaria import training
from helpers.environments import Deed

Fault = Callable[[GrowthEnvironment, int], None]
"""Harms a row just before a decision of it."""


def nan_in_weights(env: GrowthEnvironment, row: int) -> None:
    """One weight of the first layer."""
    env.episode.population.hosts.theta.detach()[row, 0] = torch.nan


def nan_in_batch(env: GrowthEnvironment, row: int) -> None:
    """One example of the next minibatch: its loss, its gradient and the statistics of its batch are not finite."""
    whole = training.gather

    def spoiled(x: Tensor, index_RB: Tensor, lane_axis: int) -> Tensor:
        training.gather = whole
        examples = whole(x, index_RB, lane_axis).clone()
        lanes = examples if lane_axis == 0 else examples.unflatten(1, (env.rows, -1)).transpose(0, 1)
        lanes[row, 0] = torch.nan
        return examples

    training.gather = spoiled


def overflowing(env: GrowthEnvironment, row: int, which: Callable[[int], bool]) -> None:
    """One entry of the gradient of the host is infinite in some updates, counted from now on; its loss is as usual."""
    optimizer, trainer = env.episode.trainer.optimizer, env.episode.trainer
    whole, first = optimizer.step, trainer.update

    def spoiled(banks, grads, rates, active) -> list[Tensor]:
        if which(trainer.update - first):
            grads[0][row, -1] = torch.inf
        return whole(banks, grads, rates, active)

    optimizer.step = spoiled


def nan_in_gradient(env: GrowthEnvironment, row: int) -> None:
    """The gradient of the next update alone."""
    overflowing(env, row, lambda update: update == 0)


def dead_gradient(env: GrowthEnvironment, row: int) -> None:
    """The gradients of all updates from now on."""
    overflowing(env, row, lambda update: True)


def half_precision(env: GrowthEnvironment, row: int) -> None:
    """As dynamic loss scaling overflows in float16: in the first few updates, and then now and again."""
    overflowing(env, row, lambda update: update < 10 or update % 40 == 0)


def exploding_rate(env: GrowthEnvironment, row: int) -> None:
    """A learning rate a million times too high, from now on."""
    for rate_R in (env.episode.contexts.rate_R, env.episode.trainer.rate_R):
        rate_R[row] = 5e3


def deadly_seed(env: GrowthEnvironment, row: int) -> None:
    """The seed in the incubator of the row becomes one that harms its host once it is blended, and is advanced."""
    population = env.episode.population
    for (site, _), bank in population.seeds.items():
        lane = (bank.row == row).nonzero()[0]
        if len(lane) and population.slots.stage[row, site] == int(Stage.TRAINING):
            bank.theta.detach()[int(lane[0])] = 1e4


def false_alarm(env: GrowthEnvironment, row: int) -> None:
    """Nothing happens to the row, but the governor hears that it is not finite."""
    governor = env.episode.governor
    whole = governor.judge

    def misled(*losses, finite_R, **more):
        governor.judge = whole
        return whole(*losses, finite_R=finite_R.index_fill(0, torch.tensor([row]), False), **more)

    governor.judge = misled


FAULTS: dict[str, Fault] = {"weights": nan_in_weights, "rate": exploding_rate, "gradients": dead_gradient}
"""Of states: the row must be rolled back."""
SKIPS: dict[str, Fault] = {"batch": nan_in_batch, "gradient": nan_in_gradient, "half precision": half_precision}
"""Of updates: they must be skipped, and nothing else happens."""


def harmed(env: GrowthEnvironment, deed: Deed, fault: Fault, rows: tuple[int, ...], decision: int) -> Deed:
    """The same deeds, and a fault of some rows before one decision."""
    made = -1

    def act(situation: Situation) -> Tensor:
        nonlocal made
        made += 1
        action_RH = deed(situation)
        if made == decision:
            for row in rows:
                fault(env, row)
        return action_RH

    return act


@dataclass(frozen=True)
class RowState:
    """Everything that a rollback brings back; [slots] of committed seeds alone."""

    host: tuple[Tensor, ...]
    seeds: dict[int, Tensor]
    slots: dict[tuple[str, int], float]

    @classmethod
    def of(cls, env: GrowthEnvironment, row: int) -> RowState:
        population = env.episode.population
        hosts, slots = population.hosts, population.slots
        committed = (slots.stage[row] == int(Stage.FOSSILIZED)).nonzero()[:, 0].tolist()
        seeds = {
            site: bank.theta.detach()[int((bank.row == row).nonzero()[0][0])].clone()
            for (site, _), bank in population.seeds.items()
            if site in committed and (bank.row == row).any()
        }
        kept = {(name, slot): getattr(slots, name)[row, slot].item() for name in EMPTY_SLOT for slot in committed}
        return cls(tuple(t.detach()[row].clone() for t in (hosts.theta, *hosts.buffers)), seeds, kept)

    def same_as(self, other: RowState) -> bool:
        """Equal, bit for bit; NaN is NaN."""
        return (
            all(torch.equal(one, two) for one, two in zip(self.host, other.host, strict=True))
            and self.seeds.keys() == other.seeds.keys()
            and all(torch.equal(self.seeds[site], other.seeds[site]) for site in self.seeds)
            and repr(self.slots) == repr(other.slots)
        )
