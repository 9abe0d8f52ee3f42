"""Growth by a plan that is fixed beforehand: the control that shows what deciding is worth.

Shape suffixes: R rows, S slots.
"""

import torch

from esper.leyline.actions import Blueprint, Op
from esper.leyline.slots import legal_ops
from esper.leyline.stages import Stage
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import RECIPE, Gardener, PlainController, Recipe, first_wish, passing, scored


class ScheduleController(PlainController):
    """Germinates what its plan names, each row by its own; advances and commits as soon as the gates let it.

    Nothing is culled and nothing is tried twice. One action a decision: what is due and has to wait is done as soon as
    it can be, commitments first, then germinations in the order in which they were due.

    Parameters
    ----------
    blueprint_RS
        Int64: what to germinate in each slot, NOOP for nothing.
    start_RS
        Int64: from which decision on.
    recipe
        How to germinate.
    """

    _memory = ("_sown_RS",)

    _view: PopulationView

    def __init__(self, blueprint_RS: torch.Tensor, start_RS: torch.Tensor, *, recipe: Recipe = RECIPE) -> None:
        self._blueprint_RS, self._start_RS = blueprint_RS, start_RS
        self._gardener = Gardener(recipe, blueprint_RS.device)
        self._every_R = torch.arange(len(blueprint_RS), device=blueprint_RS.device)
        self._sown_RS = blueprint_RS == int(Blueprint.NOOP)

    def observe(self, view: PopulationView) -> None:
        """Keep the view, and see what has been sown."""
        self._view = view
        self._sown_RS = self._sown_RS | (view.slots.stage != int(Stage.DORMANT))

    def act(self) -> torch.Tensor:
        """Commit, germinate what is due, advance, or wait."""
        view, slots = self._view, self._view.slots
        advance_RS, fossilize_RS = passing(view)
        due_RS = (
            ~self._sown_RS & (self._start_RS <= view.decision) & legal_ops(slots, view.fits_SB)[:, int(Op.GERMINATE)]
        )
        op_R, slot_R = first_wish(
            (
                (Op.FOSSILIZE, scored(fossilize_RS, slots.stage_age)),
                (Op.GERMINATE, scored(due_RS, -self._start_RS)),
                (Op.ADVANCE, scored(advance_RS, slots.stage)),
            )
        )
        return self._gardener.actions(op_R, slot_R, self._blueprint_RS[self._every_R, slot_R])
