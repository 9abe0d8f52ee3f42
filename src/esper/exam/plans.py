"""Fixed plans: whatever can be grown without looking, as one family that is as large as the space of actions.

Shapes: N plans, K seeds of a plan, F columns of a plan's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from esper.leyline.actions import ALPHA_TARGETS, TEMPOS, Blueprint, Style
from esper.leyline.config import PopulationConfig
from esper.leyline.sites import SlotConfig, fit_table
from esper.leyline.streams import Stream
from esper.tamiyo.controllers.plan import STAYS, Column

MOST_SEEDS = 3
"""Seeds of a plan."""
CULLED = 0.15
"""Share of the seeds of sampled plans that are culled again."""
AT_ONCE = 0.5
"""Share of the seeds of sampled plans that begin as soon as their slot is empty, at decision 0 where it is new."""
_NUMBERS = 9
"""Random numbers for each seed of a sampled plan."""

T = TypeVar("T")


@dataclass(frozen=True)
class Seed:
    """One seed of a plan.

    Attributes
    ----------
    slot
        Index of its slot.
    blueprint, style
        What it is, and how it joins the host.
    tempo, alpha_target
        Decisions of its ramp, one of `TEMPOS`; where the ramp ends, one of `ALPHA_TARGETS`.
    begin
        Decision from which on it is germinated.
    cull
        Decision from which on it is culled; None: it is committed.
    """

    slot: int
    blueprint: Blueprint
    style: Style
    tempo: int = TEMPOS[0]
    alpha_target: float = 1.0
    begin: int = 0
    cull: int | None = None

    def row(self) -> list[int]:
        """Its row of the table that `PlanController` plays."""
        values = {
            Column.SLOT: self.slot,
            Column.BLUEPRINT: int(self.blueprint),
            Column.STYLE: int(self.style),
            Column.TEMPO: TEMPOS.index(self.tempo),
            Column.ALPHA_TARGET: ALPHA_TARGETS.index(self.alpha_target),
            Column.BEGIN: self.begin,
            Column.CULL: STAYS if self.cull is None else self.cull,
        }
        return [values[column] for column in Column]

    def text(self, slot_ids: Sequence[str]) -> str:
        """Say it in words: `norm linear_add r0c0 at 0`, and what differs from the shortest ramp to 1."""
        parts = [f"{self.blueprint.name.lower()} {self.style.name.lower()} {slot_ids[self.slot]} at {self.begin}"]
        parts += [f"over {self.tempo}"] if self.tempo != TEMPOS[0] else []
        parts += [f"to {self.alpha_target:g}"] if self.alpha_target != 1.0 else []
        parts += [f"culled at {self.cull}"] if self.cull is not None else []
        return " ".join(parts)


@dataclass(frozen=True)
class Plan:
    """Seeds in the order in which they begin; none: nothing is grown."""

    seeds: tuple[Seed, ...] = ()

    def text(self, slot_ids: Sequence[str]) -> str:
        """Say it in words."""
        return ", ".join(seed.text(slot_ids) for seed in self.seeds) or "nothing"


NOTHING = Plan()


@dataclass(frozen=True)
class Family:
    """All plans that hosts of one kind can play.

    Attributes
    ----------
    host
        Its slots.
    fitting
        Blueprints that may be germinated in each slot.
    horizon
        Decisions of an episode.
    waiting
        Decisions from a cull to the first at which its slot is empty again.
    committing
        Decisions from a germination to the last at which the seed can be committed, if no gate delays it and its ramp
        is the shortest.
    """

    host: SlotConfig
    fitting: tuple[tuple[Blueprint, ...], ...]
    horizon: int
    waiting: int
    committing: int

    @classmethod
    def of(cls, config: PopulationConfig, host: SlotConfig) -> Family:
        """Give the family for the hosts of a run.

        Raises
        ------
        EsperError
            No allowed blueprint fits.
        """
        fits_SB = fit_table(host, config.allowed_blueprints())
        fitting = tuple(tuple(b for b in Blueprint if fits_B[int(b)]) for fits_B in fits_SB.tolist())
        gates = config.growth.gates
        # CULLED is seen once, EMBARGOED so many times, RESETTING once. GERMINATED is one decision, committing one.
        committing = gates.min_training_decisions + gates.min_probation_decisions + TEMPOS[0] + 2
        return cls(host, fitting, config.training.horizon, config.growth.embargo + 3, committing)

    def misfit(self, plan: Plan) -> str | None:
        """What keeps a host from playing a plan as it says; None where nothing does."""
        empty_at = dict.fromkeys(range(self.host.slots), 0)
        if len(plan.seeds) > MOST_SEEDS or list(plan.seeds) != sorted(plan.seeds, key=lambda seed: seed.begin):
            return f"a plan has at most {MOST_SEEDS} seeds, in the order in which they begin"
        for seed in plan.seeds:
            if seed.slot not in range(self.host.slots):
                return f"there is no slot {seed.slot}"
            if seed.blueprint not in self.fitting[seed.slot]:
                return f"{seed.blueprint.name.lower()} does not fit {self.host.slot_ids[seed.slot]}"
            if seed.tempo not in TEMPOS or seed.alpha_target not in ALPHA_TARGETS:
                return f"no ramp takes {seed.tempo} decisions to {seed.alpha_target:g}"
            if not empty_at[seed.slot] <= seed.begin < self.horizon:
                return f"a seed cannot begin in {self.host.slot_ids[seed.slot]} at decision {seed.begin}"
            if seed.cull is not None and not seed.begin < seed.cull < self.horizon:
                return f"a seed that begins at {seed.begin} cannot be culled at {seed.cull}"
            empty_at[seed.slot] = self.horizon if seed.cull is None else seed.cull + self.waiting
        return None

    def singles(self) -> tuple[Plan, ...]:
        """Every blueprint in every style in every slot: one seed, from decision 0, committed."""
        every = ((slot, b) for slot, fitting in enumerate(self.fitting) for b in fitting)
        return tuple(Plan((Seed(slot, b, style),)) for (slot, b), style in product(every, Style))

    def sampled(self, count: int, seed: int, name: str, first: int = 0) -> tuple[Plan, ...]:
        """Draw plans; what number n is depends on run seed, name and n alone.

        Parameters
        ----------
        count
            How many.
        seed, name
            Of the run, and of the stream.
        first
            Number of the first.
        """
        number_N = torch.arange(first, first + count)
        stream = Stream(seed, name)
        uniform = stream.uniform(number_N, torch.zeros_like(number_N), 1 + MOST_SEEDS * _NUMBERS).tolist()
        return tuple(self._drawn(numbers) for numbers in uniform)

    def _drawn(self, numbers: list[float]) -> Plan:
        """Make a plan of uniform numbers."""
        empty_at = {slot: 0 for slot, fitting in enumerate(self.fitting) if fitting}
        seeds: list[Seed] = []
        for k in range(1 + int(MOST_SEEDS * numbers[0])):
            u = iter(numbers[1 + k * _NUMBERS : 1 + (k + 1) * _NUMBERS])
            free = [slot for slot, at in empty_at.items() if at < self.horizon]
            if not free:
                break
            slot = _pick(free, next(u))
            blueprint, style = _pick(self.fitting[slot], next(u)), _pick(tuple(Style), next(u))
            tempo, target = _pick(TEMPOS, next(u)), _pick(ALPHA_TARGETS, next(u))
            at_once, when, culled, until = next(u) < AT_ONCE, next(u), next(u) < CULLED, next(u)
            begin = empty_at.pop(slot)
            if not at_once:
                begin = _pick(range(begin, max(begin, self.horizon - self.committing) + 1), when)
            cull = None
            if culled and begin + 1 < self.horizon:
                cull = _pick(range(begin + 1, self.horizon), until)
                empty_at[slot] = cull + self.waiting
            seeds.append(Seed(slot, blueprint, style, tempo, target, begin, cull))
        return Plan(tuple(sorted(seeds, key=lambda seed: seed.begin)))


def candidates(family: Family, named: Sequence[Plan], seed: int, count: int | None = None) -> tuple[Plan, ...]:
    """Growing nothing, plans that were named, every single seed from the start, and plans drawn from the family.

    Parameters
    ----------
    named
        What somebody found elsewhere.
    seed
        Of the run.
    count
        How many in all, each once; None: without drawn ones.
    """
    found = dict.fromkeys((NOTHING, *named, *family.singles()))
    drawn = 0
    while count is not None and len(found) < count:
        found |= dict.fromkeys(family.sampled(count - len(found), seed, "plans", drawn))
        drawn += count
    return tuple(found)[:count]


def _pick(choices: Sequence[T], uniform: float) -> T:
    """Give the choice at a uniform number in (0, 1)."""
    return choices[int(uniform * len(choices))]


def plan_table(plans: Sequence[Plan], device: torch.device | str = "cpu") -> Tensor:
    """Int64 [N, K, F]: what `PlanController` plays."""
    absent = [0] * len(Column)
    rows = [[seed.row() for seed in plan.seeds] + [absent] * (MOST_SEEDS - len(plan.seeds)) for plan in plans]
    return torch.tensor(rows, dtype=torch.int64, device=device).reshape(len(plans), MOST_SEEDS, len(Column))
