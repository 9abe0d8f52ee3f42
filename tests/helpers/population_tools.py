"""Populations in mixed stages that train on random data, and what must hold of every one of them."""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper.kasmina.banks import Bank
from esper.kasmina.export import export_row
from esper.kasmina.hosts import Host
from esper.kasmina.optim import RowOptimizer
from esper.kasmina.population import Population
from esper.leyline.actions import Blueprint, Head, Op, Operator, SiteKind
from esper.leyline.checks import ALL_GATE_CHECKS, Check, GateReport
from esper.leyline.config import GateConfig, GrowthConfig, HostConfig, OptimizerConfig
from esper.leyline.slots import AlphaMode
from esper.leyline.stages import OCCUPIED_STAGES, Stage
from esper.tolaria.batches import BatchOrder
from esper.tolaria.datasets import Split
from esper.tolaria.training import Trainer
from helpers.growing import CLASSES, EXAMPLES, FULL, WAIT, Action, act, germinate

KINDS = (SiteKind.VECTOR, SiteKind.SIGNAL, SiteKind.IMAGE)
BLUEPRINTS = {
    SiteKind.VECTOR: (Blueprint.MLP_SMALL, Blueprint.LORA_SMALL, Blueprint.ATTENTION),
    SiteKind.SIGNAL: (Blueprint.CONV_LIGHT, Blueprint.LORA_SMALL, Blueprint.ATTENTION),
    SiteKind.IMAGE: (Blueprint.CONV_LIGHT, Blueprint.DEPTHWISE, Blueprint.NORM),
}
"""A few blueprints of each kind, the most capable first."""
HOST_NORMS = {
    SiteKind.VECTOR: ("none", "batch", "group", "layer"),
    SiteKind.SIGNAL: ("none", "batch", "group"),
    SiteKind.IMAGE: ("none", "batch", "group"),
}
LANE_STATE = ("theta", "first", "second", "steps", "decay", "birth_N")
"""What a lane of a bank carries from update to update, its buffers aside."""
HOSTS = "hosts"


class Wish(NamedTuple):
    """A seed that should stand in a slot."""

    blueprint: Blueprint
    stage: Stage
    operator: Operator = Operator.ADD
    target: int = FULL
    fading: bool = False


def populate(
    kind: SiteKind,
    ids: Sequence[int],
    widths: tuple[int, ...] = (6, 5),
    *,
    incubator: str = "shadow",
    embargo: int = 2,
    dtype: torch.dtype = torch.float32,
    seed: int = 4,
    **host: object,
) -> Population:
    """Rows with these initialisation ids; `host` as in `HostConfig`."""
    config = HostConfig.model_validate({"kind": kind, "widths": widths, **host})
    gates = GateConfig(min_training_decisions=1, min_probation_decisions=1)
    growth = GrowthConfig.model_validate({"gates": gates, "embargo": embargo, "incubator": incubator})
    body = Host(config, EXAMPLES[kind], CLASSES)
    return Population(body, growth, seed, torch.tensor(ids), dtype=dtype)


def make_split(kind: SiteKind, examples: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Split:
    """Noise with classes that a linear function of it decides, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((examples, *EXAMPLES[kind]), generator=generator, dtype=torch.float64)
    rule = torch.randn(x[0].numel(), CLASSES, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return Split(x.to(dtype), (x.flatten(1) @ rule).argmax(1))


def train_on(
    population: Population,
    ids: Sequence[int],
    data: Split,
    *,
    batch_size: int = 8,
    total: int = 40,
    seed: int = 4,
    **optimizer: object,
) -> Trainer:
    """Trainer of a population whose rows have these data ids; `optimizer` as in `OptimizerConfig`."""
    order = BatchOrder(seed, torch.tensor(ids), len(data.y), batch_size)
    config = OptimizerConfig.model_validate({"learning_rate": 0.02, **optimizer})
    return Trainer(population, data, order, config, total)


def open_gates(population: Population) -> GateReport:
    """A report in which everything passes but what is not so: alpha at its target."""
    report = population.gate_report(torch.ones(population.rows))
    free = torch.tensor([check is not Check.ALPHA_AT_TARGET for check in ALL_GATE_CHECKS])
    return GateReport(report.value_CRS, report.passed_CRS | free[:, None, None], report.limit_CRS)


def decide(population: Population, wanted: Mapping[int, Action]) -> None:
    """One decision with open gates: these actions by row, the other rows wait. All must be accepted."""
    actions = torch.tensor([list(wanted.get(row, WAIT)) for row in range(population.rows)])
    outcome, _ = population.decide(actions, open_gates(population))
    assert outcome.accepted.all(), (actions, outcome.refused_by)


def bring(population: Population, wishes: Mapping[tuple[int, int], Wish], trainer: Trainer | None = None) -> None:
    """Decide until every (row, site) is as wished, fades last; make an update after each decision."""
    for _ in range(60):
        wanted: dict[int, Action] = {}
        for (row, site), wish in wishes.items():
            action = _step_towards(population, row, site, wish)
            if action is not None and row not in wanted:
                wanted[row] = action
        if not wanted:
            break
        decide(population, wanted)
        if trainer is not None:
            trainer.run(1)
    # A fade of 8 decisions: several sites of one row can begin one after the other.
    fades = {place: act(Op.CULL, place[1], alpha_speed=3) for place, wish in wishes.items() if wish.fading}
    while fades:
        now = {row: (row, site) for row, site in fades}
        decide(population, {row: fades.pop(place) for row, place in now.items()})
        if trainer is not None:
            trainer.run(1)
    for (row, site), wish in wishes.items():
        assert population.slots.stage[row, site] == int(wish.stage)
        assert population.slots.fading_RS()[row, site] == wish.fading


def _step_towards(population: Population, row: int, site: int, wish: Wish) -> Action | None:
    slots = population.slots
    stage = Stage(int(slots.stage[row, site]))
    if stage is Stage.DORMANT:
        return germinate(site, wish.blueprint, wish.operator, wish.target)
    if slots.alpha_mode[row, site] != int(AlphaMode.HOLD):
        return WAIT if wish.fading or wish.stage is not Stage.BLENDING else None
    if stage is wish.stage:
        return None
    return act(Op.FOSSILIZE if stage is Stage.PROBATIONARY else Op.ADVANCE, site)


def mixed_stages(kind: SiteKind) -> dict[tuple[int, int], Wish]:
    """Four rows of two sites: every stage that holds a seed, every operator, banks that rows share and do not."""
    first, second, third = BLUEPRINTS[kind]
    add, multiply, gate = Operator.ADD, Operator.MULTIPLY, Operator.GATE
    return {
        (0, 0): Wish(first, Stage.BLENDING, multiply),
        (0, 1): Wish(second, Stage.TRAINING, gate),
        (1, 0): Wish(first, Stage.BLENDING, gate),
        (1, 1): Wish(second, Stage.TRAINING, add),
        (2, 0): Wish(first, Stage.FOSSILIZED, gate),
        (2, 1): Wish(third, Stage.PROBATIONARY, multiply),
        (3, 0): Wish(first, Stage.TRAINING, add),
        (3, 1): Wish(second, Stage.BLENDING, add, fading=True),
    }


def banks_by_key(population: Population) -> dict[object, Bank]:
    """Every bank: `HOSTS`, (site, blueprint) and ("gate", site)."""
    gates = {("gate", site): bank for site, bank in population.seed_gates.items()}
    return {HOSTS: population.hosts, **population.seeds, **gates}


def lanes_of_row(population: Population, row: int) -> dict[tuple[object, str], Tensor]:
    """Copies of everything that the lanes of one row carry, by bank and name."""
    state: dict[tuple[object, str], Tensor] = {}
    for key, bank in banks_by_key(population).items():
        for lane in np.flatnonzero(bank.row == row):
            for name in LANE_STATE:
                state[key, name] = getattr(bank, name)[lane].detach().clone()
            for number, buffer in enumerate(bank.buffers):
                state[key, f"buffer {number}"] = buffer[lane].clone()
    return state


def same_state(ours: Mapping[tuple[object, str], Tensor], theirs: Mapping[tuple[object, str], Tensor]) -> None:
    """Assert that two copies are bit-equal."""
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def same_numbers(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two tensors are bit-equal, NaN where the other is NaN."""
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def audit(population: Population) -> None:
    """Assert that the banks hold what lives in the slots, each once, and nothing else."""
    slots = population.slots
    stage = slots.stage.numpy()
    occupied = np.isin(stage, [int(s) for s in OCCUPIED_STAGES])
    gated = occupied & (slots.operator.numpy() == Operator.GATE)
    seeds: dict[tuple[int, int], list[tuple[int, int]]] = {}
    gates: dict[int, list[tuple[int, int]]] = {}
    for row, site in np.argwhere(occupied):
        lane = (int(row), int(slots.seed_id[row, site]))
        seeds.setdefault((int(site), int(slots.blueprint[row, site])), []).append(lane)
        if gated[row, site]:
            gates.setdefault(int(site), []).append(lane)
        numbers = population.seeds[site, int(slots.blueprint[row, site])].layer.parameter_count
        if gated[row, site]:
            numbers += population.seed_gates[site].layer.parameter_count
        assert slots.parameters[row, site] == numbers
    assert {key: _lanes(bank) for key, bank in population.seeds.items()} == seeds
    assert {site: _lanes(bank) for site, bank in population.seed_gates.items()} == gates
    assert _lanes(population.hosts) == [(row, 0) for row in range(population.rows)]

    banks = list(population.banks)
    assert sum(len(bank) for bank in banks) == occupied.sum() + gated.sum() + population.rows
    grown = sum(bank.theta.numel() for bank in banks[1:])
    assert grown == slots.parameters.sum()
    for bank in banks:
        assert bank.theta.is_leaf
        assert bank.theta.requires_grad
        assert bank.theta.shape == (len(bank), bank.layer.parameter_count)
        assert bank.theta.shape == bank.first.shape == bank.second.shape == bank.scratch.shape
        assert bank.steps.shape == bank.norm_sum.shape == bank.row_N.shape == (len(bank),)
        assert bank.row_N.tolist() == bank.row.tolist()
    tensors = [t for bank in banks for t in (bank.theta, bank.first, bank.second, bank.steps, *bank.buffers)]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == len(tensors)

    assert (slots.seed_id[~torch.from_numpy(occupied)] == -1).all()
    assert (slots.parameters[~torch.from_numpy(occupied)] == 0).all()
    for row in range(population.rows):
        ids = slots.seed_id[row][slots.seed_id[row] >= 0].tolist()
        assert len(ids) == len(set(ids))
        assert all(number < slots.seeds_made[row] for number in ids)


def _lanes(bank: Bank) -> list[tuple[int, int]]:
    return [(int(row), int(seed_id)) for row, seed_id in zip(bank.row, bank.seed_id, strict=True)]


def learning_lanes(population: Population) -> dict[object, list[int]]:
    """Rows of each bank whose lanes the optimizer moves, every bank named at most once."""
    name_of = {id(bank): key for key, bank in banks_by_key(population).items()}
    learning: dict[object, list[int]] = {}
    for bank, active in population.learning():
        key = name_of[id(bank)]
        assert key not in learning
        rows = bank.row if active is None else bank.row[active.numpy()]
        learning[key] = rows.tolist()
    return learning


def network_with(population: Population, row: int, enabled: Sequence[bool]) -> nn.Module:
    """One row as a plain network of its host and these seeds; one in the incubator stands at its target."""
    other = copy.copy(population)
    other.base = population.base.copy()
    other.base[row] = enabled
    other.slots = population.slots.clone()
    incubated = other.slots.stage == int(Stage.TRAINING)
    other.slots.alpha = torch.where(incubated, other.slots.alpha_target, other.slots.alpha)
    return export_row(other, row)


class RecordingOptimizer(RowOptimizer):
    """Keeps a copy of the gradients of the last step, and can spoil them first."""

    def __init__(self, config: OptimizerConfig, spoil: Mapping[tuple[int, int], float] | None = None) -> None:
        super().__init__(config)
        self.spoil = dict(spoil or {})
        """Value to write into the gradient of the bank at (position, lane)."""
        self.grads: list[Tensor] = []
        self.banks: list[Bank] = []

    @torch.no_grad()
    def step(
        self, banks: Sequence[Bank], grads: Sequence[Tensor], rates: Sequence[Tensor], active: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Record, spoil, update."""
        self.banks, self.grads = list(banks), [grad.clone() for grad in grads]
        for (bank, lane), value in self.spoil.items():
            grads[bank][lane, 0] = value
        return super().step(banks, grads, rates, active)

    def of(self, bank: Bank) -> Tensor:
        """Gradient of a bank in the last step."""
        (grad,) = [grad for other, grad in zip(self.banks, self.grads, strict=True) if other is bank]
        return grad


def record(trainer: Trainer) -> RecordingOptimizer:
    """Give a trainer an optimizer that records."""
    trainer.optimizer = recorder = RecordingOptimizer(trainer.config)
    return recorder


def op_of(action: Action) -> Op:
    """Operation of an action."""
    return Op(action[Head.OP])
