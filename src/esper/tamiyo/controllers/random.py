"""Uniform choice among everything that is legal: what growth is worth without any decision behind it.

Shape suffixes: R rows, S slots, H heads, O operations, C choices.
"""

import torch

from esper.leyline.actions import ALPHA_SPEEDS, HEAD_COUNT, Head, Op, head_sizes
from esper.leyline.slots import gradual_cull_legal, legal_ops
from esper.leyline.streams import Stream
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import PlainController, used_heads


class RandomController(PlainController):
    """Draws the operation, then its slot, then the rest, each uniformly over what is structurally possible.

    It does not look at gates: an advance or a fossilization that comes too early is refused by the engine.

    Parameters
    ----------
    seed
        Seed of the run.
    row_ids_R
        Identity of each row: together with the decision it decides the row's numbers, and nothing else does.
    slots
        Number of slots.
    """

    _view: PopulationView

    def __init__(self, seed: int, row_ids_R: torch.Tensor, *, slots: int) -> None:
        self._stream = Stream(seed, "controller/random")
        self._row_ids_R = row_ids_R
        self._sizes_H = torch.tensor(list(head_sizes(slots).values()), device=row_ids_R.device)
        self._used_OH = used_heads(row_ids_R.device)

    def observe(self, view: PopulationView) -> None:
        """Keep the view."""
        self._view = view

    def act(self) -> torch.Tensor:
        """Draw one legal action for each row."""
        slots, fits_SB = self._view.slots, self._view.fits_SB
        decision_R = torch.full_like(self._row_ids_R, self._view.decision)
        uniform_RH = self._stream.uniform(self._row_ids_R, decision_R, HEAD_COUNT)
        legal_ROS = legal_ops(slots, fits_SB)

        action_RH = (uniform_RH * self._sizes_H).long()
        op_R = _pick(legal_ROS.any(2), uniform_RH[:, Head.OP])
        slot_R = _pick(_row_of(legal_ROS, op_R), uniform_RH[:, Head.SLOT])
        at_once_R = (op_R == int(Op.CULL)) & ~_row_of(gradual_cull_legal(slots), slot_R)
        action_RH[:, Head.OP] = op_R
        action_RH[:, Head.SLOT] = slot_R
        action_RH[:, Head.BLUEPRINT] = _pick(fits_SB[slot_R], uniform_RH[:, Head.BLUEPRINT])
        action_RH[:, Head.ALPHA_SPEED] = torch.where(at_once_R, ALPHA_SPEEDS.index(0), action_RH[:, Head.ALPHA_SPEED])
        return action_RH * self._used_OH[op_R]


def _row_of(table: torch.Tensor, index_R: torch.Tensor) -> torch.Tensor:
    """Give table[r, index[r]] of each row r."""
    return table[torch.arange(len(index_R), device=index_R.device), index_R]


def _pick(legal_RC: torch.Tensor, uniform_R: torch.Tensor) -> torch.Tensor:
    """Int64 [R]: a choice that is uniform over the legal ones (0 where there is none)."""
    nth_R = (uniform_R * legal_RC.sum(1)).long()
    chosen_RC = legal_RC & (legal_RC.cumsum(1) == nth_R[:, None] + 1)
    return chosen_RC.int().argmax(1)
