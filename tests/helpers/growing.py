"""Growing a population by ordinary actions, its measurements written by hand instead of trained for."""

from collections.abc import Mapping, Sequence

import torch

from esper.kasmina.hosts import Host
from esper.kasmina.population import Population
from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Head, Op, Operator, SiteKind, Style
from esper.leyline.config import GateConfig, GrowthConfig, HostConfig

EXAMPLES: dict[SiteKind, tuple[int, ...]] = {
    SiteKind.VECTOR: (7,),
    SiteKind.SIGNAL: (2, 9),
    SiteKind.IMAGE: (2, 6, 5),
}
"""Shape of one example of each kind."""
CLASSES = 3
STYLES: dict[Operator, Style] = {
    Operator.ADD: Style.LINEAR_ADD,
    Operator.MULTIPLY: Style.LINEAR_MULTIPLY,
    Operator.GATE: Style.GATED_GATE,
}
"""A style with each operator."""
QUICK = GrowthConfig(gates=GateConfig(min_training_decisions=1, min_probation_decisions=1, contribution_errors=-10.0))
GOOD = {
    "gradient_norm": 1.0,
    "gradient_ratio": 1.0,
    "incubator_gain": 1.0,
    "incubator_gain_se": 0.1,
    "contribution": 1.0,
    "contribution_se": 0.1,
}
"""What lets a seed pass every gate."""
FULL = ALPHA_TARGETS.index(1.0)
HALF = ALPHA_TARGETS.index(0.5)

Action = list[int]
WAIT: Action = [0] * len(Head)


def make_population(
    kind: SiteKind, rows: int, widths: tuple[int, ...] = (6,), *, dtype: torch.dtype = torch.float64, **host: str
) -> Population:
    """Rows of different hosts with a site behind each of `widths`; `host` as in `HostConfig`."""
    config = HostConfig(kind=kind, widths=widths, **host)
    body = Host(config, EXAMPLES[kind], CLASSES)
    return Population(body, QUICK, seed=4, init_id_R=torch.arange(rows), dtype=dtype)


def act(op: Op, slot: int, **heads: int) -> Action:
    """An action; `heads` by their lower-case names."""
    action = [int(op), slot, *WAIT[2:]]
    for name, choice in heads.items():
        action[Head[name.upper()]] = int(choice)
    return action


def germinate(slot: int, blueprint: Blueprint, operator: Operator, target: int = FULL) -> Action:
    """Germinate for the shortest first ramp."""
    return act(Op.GERMINATE, slot, blueprint=blueprint, style=STYLES[operator], tempo=0, alpha_target=target)


def to_blending(slot: int) -> list[Action]:
    """From GERMINATED to the first step of the first ramp."""
    return [act(Op.ADVANCE, slot)] * 2


def to_fossilized(slot: int) -> list[Action]:
    """From GERMINATED, through a whole ramp."""
    ramp = [WAIT] * (TEMPOS[0] - 1)
    return [*to_blending(slot), *ramp, act(Op.ADVANCE, slot), act(Op.FOSSILIZE, slot)]


def perform(population: Population, plans: Mapping[int, Sequence[Action]]) -> None:
    """Perform the actions of each row so that all end at the same decision; every one must be accepted."""
    longest = max(len(plan) for plan in plans.values())
    for step in range(longest):
        actions = torch.tensor([WAIT] * population.rows)
        for row, plan in plans.items():
            at = step - (longest - len(plan))
            if at >= 0:
                actions[row] = torch.tensor(plan[at])
        for name, value in GOOD.items():
            getattr(population.slots, name).masked_fill_(population.slots.seed_id >= 0, value)
        outcome, _ = population.decide(actions, population.gate_report(torch.ones(population.rows)))
        assert outcome.accepted.all(), (step, actions[~outcome.accepted], outcome.refused_by)


def lay_out(population: Population, examples_RB: torch.Tensor) -> torch.Tensor:
    """Examples [R, B, ...] of all rows in the layout that the population computes on."""
    if population.lane_axis == 0:
        return examples_RB
    return examples_RB.transpose(0, 1).flatten(1, 2).contiguous()


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
