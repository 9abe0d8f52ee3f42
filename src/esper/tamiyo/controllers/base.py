"""What the controllers share: turning wishes about slots into one action for each row.

Shape suffixes: R rows, S slots, H heads, O operations, B blueprints, P places in the order of blueprints.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from esper.leyline.actions import (
    ALPHA_SPEEDS,
    ALPHA_TARGETS,
    HEAD_COUNT,
    HEADS_OF_OP,
    TEMPOS,
    Blueprint,
    Head,
    Op,
    Style,
)
from esper.leyline.checks import ALL_GATE_CHECKS, GATE_OF_STAGE, Check, Gate
from esper.leyline.slots import legal_ops
from esper.leyline.stages import ADVANCE_TARGET
from esper.leyline.state import Tensors, put_back, taken
from esper.leyline.view import PopulationView, Scores


@dataclass(frozen=True)
class Recipe:
    """How a controller without a learned policy germinates."""

    style: Style = Style.LINEAR_ADD
    """Operator and curve of every seed."""
    tempo: int = TEMPOS[0]
    """Decisions of the ramp, one of `TEMPOS`."""
    alpha_target: float = 1.0
    """One of `ALPHA_TARGETS`."""
    order: tuple[Blueprint, ...] = (
        Blueprint.CONV_HEAVY,
        Blueprint.MLP_LARGE,
        Blueprint.CONV_LIGHT,
        Blueprint.MLP_SMALL,
        Blueprint.BOTTLENECK,
        Blueprint.ATTENTION,
        Blueprint.FLEX_ATTENTION,
        Blueprint.LORA_LARGE,
        Blueprint.POINTWISE,
        Blueprint.DEPTHWISE,
        Blueprint.LORA_SMALL,
        Blueprint.NORM,
    )
    """Every blueprint but NOOP in the order of their turn, the most capable first."""


RECIPE = Recipe()


class PlainController:
    """What controllers without a policy share: nothing to check, no probabilities, a memory of named attributes."""

    flag: torch.Tensor | None = None
    scores: Scores | None = None
    _memory: ClassVar[tuple[str, ...]] = ()
    """Attributes that decisions to come depend on."""

    def state(self) -> Tensors:
        """See `Controller`."""
        return taken(self, self._memory)

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """See `Controller`."""
        put_back(self, self._memory, saved)


def used_heads(device: torch.device | str) -> torch.Tensor:
    """Int64 [O, H]: 1 where an operation uses a head; multiplied in, it leaves 0 in heads without meaning."""
    return torch.tensor([[int(head in HEADS_OF_OP[op]) for head in Head] for op in Op], device=device)


def scored(wanted_RS: torch.Tensor, score_RS: torch.Tensor) -> torch.Tensor:
    """Keep the score of a wanted slot, and give minus infinity to each other slot."""
    return torch.where(wanted_RS, score_RS.float(), -torch.inf)


def first_wish(wishes: Sequence[tuple[Op, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each row the first operation that wants a slot, with the best slot for it (the first on a tie).

    Parameters
    ----------
    wishes
        Operations with the score [R, S] of each slot (see `scored`), the most urgent operation first.

    Returns
    -------
    tuple of torch.Tensor
        Operation [R] (WAIT where nothing is wanted) and slot [R], int64.
    """
    op_R = torch.zeros_like(wishes[0][1][:, 0], dtype=torch.int64)
    slot_R = torch.zeros_like(op_R)
    for op, score_RS in reversed(wishes):
        best_R, index_R = score_RS.max(dim=1)
        wanted_R = best_R > -torch.inf
        op_R = torch.where(wanted_R, int(op), op_R)
        slot_R = torch.where(wanted_R, index_R, slot_R)
    return op_R, slot_R


def passing(view: PopulationView) -> tuple[torch.Tensor, torch.Tensor]:
    """Bool [R, S], twice: an ADVANCE, and a FOSSILIZE, is legal and would pass its gate."""
    legal_ROS = legal_ops(view.slots, view.fits_SB)
    ready = [
        (view.slots.stage == int(stage)) & view.gates.gate_RS(GATE_OF_STAGE[target])
        for stage, target in ADVANCE_TARGET.items()
    ]
    advance_RS = torch.stack(ready).any(0) & legal_ROS[:, int(Op.ADVANCE)]
    return advance_RS, view.gates.gate_RS(Gate.G5) & legal_ROS[:, int(Op.FOSSILIZE)]


def time_to_commit(view: PopulationView, tempo: int) -> torch.Tensor:
    """Bool scalar: a seed germinated now can be committed before the horizon, if no gate delays it."""
    training = view.gates.limit_CRS[ALL_GATE_CHECKS.index(Check.TRAINING_DECISIONS)].amax()
    probation = view.gates.limit_CRS[ALL_GATE_CHECKS.index(Check.PROBATION_DECISIONS)].amax()
    # One decision as GERMINATED comes before these stages, and one that fossilizes after them.
    return training + probation + (tempo + 2) <= view.horizon - view.decision


class Gardener:
    """Turns a recipe into blueprints and actions."""

    def __init__(self, recipe: Recipe, device: torch.device | str) -> None:
        self._order_P = torch.tensor([int(b) for b in recipe.order], device=device)
        self._used_OH = used_heads(device)
        heads = [0] * HEAD_COUNT
        heads[Head.STYLE] = int(recipe.style)
        heads[Head.TEMPO] = TEMPOS.index(recipe.tempo)
        heads[Head.ALPHA_TARGET] = ALPHA_TARGETS.index(recipe.alpha_target)
        # Culled at once: a seed that is not wanted should not change the host any longer.
        heads[Head.ALPHA_SPEED] = ALPHA_SPEEDS.index(0)
        self._template_H = torch.tensor(heads, device=device)

    def blueprint(
        self, fits_RB: torch.Tensor, turn_R: torch.Tensor, penalty_RB: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        """Int64 [R]: of the fitting blueprints with the smallest penalty, the one whose turn is nearest.

        Turns count the fitting blueprints only, so that successive turns name different ones.
        """
        fits_RP = fits_RB[:, self._order_P]
        # What does not fit can only win where nothing fits, and there nothing is germinated.
        penalty_RP = torch.where(fits_RB, penalty_RB, torch.inf)[:, self._order_P]
        place_RP = fits_RP.cumsum(1) - 1
        wait_RP = (place_RP - turn_R[:, None]) % fits_RP.sum(1, keepdim=True).clamp_min(1)
        least_RP = penalty_RP == penalty_RP.amin(1, keepdim=True)
        return self._order_P[torch.where(least_RP, wait_RP, len(Blueprint)).argmin(1)]

    def actions(self, op_R: torch.Tensor, slot_R: torch.Tensor, blueprint_R: torch.Tensor) -> torch.Tensor:
        """Int64 [R, HEAD_COUNT]: these operations, germinating by the recipe and culling at once."""
        action_RH = self._template_H.repeat(len(op_R), 1)
        action_RH[:, Head.OP] = op_R
        action_RH[:, Head.SLOT] = slot_R
        action_RH[:, Head.BLUEPRINT] = blueprint_R
        return action_RH * self._used_OH[op_R]
