"""Growth by the clock: the control that shows what timing and judgement are worth.

Shape suffixes: R rows, S slots, B blueprints.
"""

import torch

from esper.leyline.actions import Op
from esper.leyline.slots import legal_ops
from esper.leyline.stages import Stage
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import (
    RECIPE,
    Gardener,
    PlainController,
    Recipe,
    first_wish,
    passing,
    scored,
    time_to_commit,
)


class PeriodicController(PlainController):
    """Germinates every `period` decisions, slots and blueprints in rotation; commits what passes its gates.

    Nothing is germinated that could not be committed before the horizon: that is arithmetic, not judgement.

    Parameters
    ----------
    period
        Decisions between two germinations; the first comes after one period. A germination that finds no free
        slot is left out.
    max_training
        A seed that stays in TRAINING longer than this many decisions is culled.
    max_probation
        The same for PROBATIONARY.
    recipe
        How to germinate.
    device
        Where the views live.
    """

    _view: PopulationView

    def __init__(
        self,
        *,
        period: int = 6,
        max_training: int = 10,
        max_probation: int = 10,
        recipe: Recipe = RECIPE,
        device: torch.device | str = "cpu",
    ) -> None:
        self._period, self._max_training, self._max_probation = period, max_training, max_probation
        self._tempo = recipe.tempo
        self._gardener = Gardener(recipe, device)

    def observe(self, view: PopulationView) -> None:
        """Keep the view: the clock and the number of seeds made are all the memory that is needed."""
        self._view = view

    def act(self) -> torch.Tensor:
        """Germinate if it is time, otherwise commit, cull what is stuck, advance, or wait."""
        view, slots = self._view, self._view.slots
        advance_RS, fossilize_RS = passing(view)
        due = (view.decision > 0 and view.decision % self._period == 0) & time_to_commit(view, self._tempo)
        free_RS = legal_ops(slots, view.fits_SB)[:, int(Op.GERMINATE)] & due
        stuck_RS = ((slots.stage == int(Stage.TRAINING)) & (slots.stage_age > self._max_training)) | (
            (slots.stage == int(Stage.PROBATIONARY)) & (slots.stage_age > self._max_probation)
        )
        # Slots left to go, around the ring, until the one whose turn it is.
        turn_RS = (torch.arange(slots.slots, device=slots.device) - slots.seeds_made[:, None]) % slots.slots
        op_R, slot_R = first_wish(
            (
                # First, because its decision does not come again; every other wish can wait for the next one.
                (Op.GERMINATE, scored(free_RS, -turn_RS)),
                (Op.FOSSILIZE, scored(fossilize_RS, slots.stage_age)),
                (Op.CULL, scored(stuck_RS & ~advance_RS & ~fossilize_RS, slots.stage_age)),
                (Op.ADVANCE, scored(advance_RS, slots.stage)),
            )
        )
        blueprint_R = self._gardener.blueprint(view.fits_SB[slot_R], slots.seeds_made)
        return self._gardener.actions(op_R, slot_R, blueprint_R)
