"""The stages of a slot and the transitions between them: the one authority for both.

Every set of stages used anywhere in Esper is computed here, from `VALID_TRANSITIONS`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Stage(IntEnum):
    """Stage of a slot. 5 is retired."""

    UNKNOWN = 0
    DORMANT = 1
    GERMINATED = 2
    TRAINING = 3
    BLENDING = 4
    PROBATIONARY = 6
    FOSSILIZED = 7
    CULLED = 8
    EMBARGOED = 9
    RESETTING = 10


STAGE_COUNT = max(Stage) + 1

VALID_TRANSITIONS: dict[Stage, frozenset[Stage]] = {
    Stage.UNKNOWN: frozenset(),
    Stage.DORMANT: frozenset({Stage.GERMINATED}),
    Stage.GERMINATED: frozenset({Stage.TRAINING, Stage.CULLED}),
    Stage.TRAINING: frozenset({Stage.BLENDING, Stage.CULLED}),
    Stage.BLENDING: frozenset({Stage.PROBATIONARY, Stage.CULLED}),
    Stage.PROBATIONARY: frozenset({Stage.FOSSILIZED, Stage.BLENDING, Stage.CULLED}),
    Stage.FOSSILIZED: frozenset(),
    Stage.CULLED: frozenset({Stage.EMBARGOED}),
    Stage.EMBARGOED: frozenset({Stage.RESETTING}),
    Stage.RESETTING: frozenset({Stage.DORMANT}),
}


def sources_of(target: Stage) -> frozenset[Stage]:
    """Stages with a transition to `target`."""
    return frozenset(s for s, targets in VALID_TRANSITIONS.items() if target in targets)


def _waiting_room() -> tuple[Stage, ...]:
    """Follow the way back from CULLED to DORMANT: each stage on it has one exit."""
    way, stage = [], Stage.CULLED
    while stage is not Stage.DORMANT:
        way.append(stage)
        (stage,) = VALID_TRANSITIONS[stage]
    return tuple(way)


def _growth_order() -> tuple[Stage, ...]:
    """Follow the way from DORMANT to the terminal stage, never through CULLED and never back."""
    order = [Stage.DORMANT]
    while VALID_TRANSITIONS[order[-1]]:
        (following,) = VALID_TRANSITIONS[order[-1]] - {Stage.CULLED, *order}
        order.append(following)
    return tuple(order)


GROWTH_ORDER = _growth_order()
"""DORMANT to FOSSILIZED."""
WAITING_STAGES = _waiting_room()
"""CULLED, EMBARGOED, RESETTING: left by the clock alone."""
TERMINAL_STAGES = frozenset(s for s, targets in VALID_TRANSITIONS.items() if not targets) - {Stage.UNKNOWN}
GERMINABLE_STAGES = sources_of(GROWTH_ORDER[1])
CULLABLE_STAGES = sources_of(Stage.CULLED)
FOSSILIZABLE_STAGES = sources_of(Stage.FOSSILIZED)
ADVANCABLE_STAGES = frozenset(GROWTH_ORDER[1:-1]) - FOSSILIZABLE_STAGES
"""Stages whose next growth stage is reached by ADVANCE: neither the first step nor the last."""
ADVANCE_TARGET = {s: GROWTH_ORDER[GROWTH_ORDER.index(s) + 1] for s in GROWTH_ORDER if s in ADVANCABLE_STAGES}
OCCUPIED_STAGES = frozenset(GROWTH_ORDER[1:])
"""A seed exists."""
BLENDED_STAGES = frozenset(GROWTH_ORDER[GROWTH_ORDER.index(Stage.BLENDING) :])
"""The seed is part of the host's forward pass."""
RETARGETABLE_STAGES = BLENDED_STAGES - TERMINAL_STAGES
"""A new alpha target may be set."""
INCUBATED_STAGE = Stage.TRAINING
YOUNG_STAGES = OCCUPIED_STAGES - BLENDED_STAGES
"""A seed exists and is not blended yet."""
ACTIVE_STAGES = BLENDED_STAGES | {INCUBATED_STAGE}
"""The seed computes something, blended or in the incubator."""
STEP_TABLE = {**ADVANCE_TARGET, **{s: next(iter(VALID_TRANSITIONS[s])) for s in WAITING_STAGES}}
"""The next stage of each stage that has exactly one way on."""


def stage_table(stages: frozenset[Stage]) -> torch.Tensor:
    """Bool [STAGE_COUNT], true at the given stages: index it with a stage tensor to test membership."""
    # Here and below: whoever only reads names of stages, as the viewers of a run do, does not wait for torch.
    import torch

    table = torch.zeros(STAGE_COUNT, dtype=torch.bool)
    table[[int(s) for s in stages]] = True
    return table


def next_stage_table() -> torch.Tensor:
    """Int64 [STAGE_COUNT]: `STEP_TABLE` as a tensor, each other stage mapped to itself."""
    import torch

    return torch.tensor([int(STEP_TABLE.get(Stage(s), s)) if s != 5 else 5 for s in range(STAGE_COUNT)])
