"""A family of fixed schedules: what can be grown without looking."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

from esper.leyline.actions import BLUEPRINTS_OF_KIND, Blueprint, SiteKind
from esper.leyline.sites import SlotConfig

STARTS = (0.0, 0.25, 0.5)
"""Shares of an episode after which a schedule begins."""


@dataclass(frozen=True)
class Plan:
    """What to germinate in each slot (NOOP: nothing), and from which decision on."""

    blueprints: tuple[Blueprint, ...]
    start: int

    def text(self, slot_ids: tuple[str, ...]) -> str:
        """Say it in words: `norm r0c0 r0c1 from decision 0`."""
        slots: dict[Blueprint, list[str]] = {}
        for blueprint, slot in zip(self.blueprints, slot_ids, strict=True):
            if blueprint is not Blueprint.NOOP:
                slots.setdefault(blueprint, []).append(slot)
        grown = ", ".join(f"{blueprint.name.lower()} {' '.join(of)}" for blueprint, of in slots.items())
        return f"{grown} from decision {self.start}" if grown else "nothing"


def family(kind: SiteKind, slots: int, horizon: int, allowed: frozenset[Blueprint]) -> tuple[Plan, ...]:
    """Every blueprint in every set of slots, at each of `STARTS`; from the start also every two in first and last slot.

    The first plan is to grow nothing.
    """
    kinds = sorted(BLUEPRINTS_OF_KIND[kind] & allowed)
    nothing = (Blueprint.NOOP,) * slots
    same = [
        tuple(blueprint if chosen else Blueprint.NOOP for chosen in places)
        for blueprint in kinds
        for places in product((False, True), repeat=slots)
        if any(places)
    ]
    mixed = [(a, *nothing[2:], b) for a, b in permutations(kinds, 2)] if slots > 1 else []
    plans = [Plan(nothing, 0)]
    plans += [Plan(blueprints, int(share * horizon)) for share in STARTS for blueprints in same]
    plans += [Plan(blueprints, 0) for blueprints in mixed]
    return tuple(plans)


def slots_of(config: SlotConfig) -> tuple[SiteKind, int]:
    """Kind and number of the slots of a host."""
    return config.sites[0].kind, config.slots
