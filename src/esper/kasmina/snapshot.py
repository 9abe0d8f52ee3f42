"""The last good state of every row, on the device: what a row that fails returns to.

Parameters and buffers are kept in the banks, beside what they are kept of, so that they follow their lanes when seeds
come and go. Whole-tensor functions: which rows are meant is never read back.

Shapes: R rows, S slots, N lanes of a bank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from esper.kasmina.population import Population
from esper.leyline.slots import EMPTY_SLOT
from esper.leyline.stages import TERMINAL_STAGES, stage_table
from esper.leyline.state import Tensors, put_back, taken


class Snapshot:
    """Keeps the rows of one population, and brings them back; it begins with all of them as they are.

    Parameters
    ----------
    population
        Whose rows.
    """

    def __init__(self, population: Population) -> None:
        self._population = population
        self._slots = population.slots.clone()
        self._committed = stage_table(TERMINAL_STAGES).to(population.device)
        self.take(torch.ones(population.rows, dtype=torch.bool, device=population.device))

    def state(self) -> Tensors:
        """Give what is kept of the slots, by name; the banks have the rest."""
        return taken(self._slots, EMPTY_SLOT)

    def put_back(self, saved: Mapping[str, Tensor]) -> None:
        """Keep what was saved.

        Raises
        ------
        ValueError
            It is of other rows.
        """
        put_back(self._slots, EMPTY_SLOT, saved)

    @torch.no_grad()
    def take(self, good_R: Tensor) -> None:
        """Replace what is kept of some rows (bool) by their present state."""
        for bank in self._population.banks:
            bank.keep(good_R[bank.row_N])
        for name in EMPTY_SLOT:
            kept = getattr(self._slots, name)
            torch.where(good_R[:, None], getattr(self._population.slots, name), kept, out=kept)

    @property
    def forgoes_R(self) -> Tensor:
        """Bool: a return would cost the row a seed that was in the forward pass of what is kept."""
        return (self._slots.blended_RS() & self._slots.on_trial_RS()).any(1)

    @torch.no_grad()
    def restore(self, back_R: Tensor) -> Tensor:
        """Return some rows (bool) to what was kept; give the seeds that were culled, bool [R, S].

        Parameters, buffers and the slots of committed seeds are as they were, bit for bit. Every other seed is culled:
        it is silenced at once and leaves its bank when the population settles next. What the clock did to empty slots
        stays done. Rows that were returned before and not kept since are returned once more.
        """
        population, slots = self._population, self._population.slots
        committed_RS = self._committed[self._slots.stage]
        back_RS = back_R[:, None] & committed_RS
        culled_RS = back_R[:, None] & (slots.seed_id >= 0) & ~committed_RS
        for name in EMPTY_SLOT:
            present = getattr(slots, name)
            torch.where(back_RS, getattr(self._slots, name), present, out=present)
        population.lifecycle.cull(slots, culled_RS)
        population.hosts.roll_back(back_R)
        placed = [(site, bank) for (site, _), bank in population.seeds.items()]
        for site, bank in [*placed, *population.seed_gates.items()]:
            bank.roll_back(back_R[bank.row_N])
            bank.silence(culled_RS[bank.row_N, site])
        return culled_RS
