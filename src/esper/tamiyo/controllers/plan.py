"""Growth by a plan that is fixed beforehand: the control that shows what deciding is worth.

Shape suffixes: R rows, S slots, K seeds of a plan, F columns of a plan's table, H heads.
"""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT, Blueprint, Head, Op
from esper.leyline.slots import legal_ops
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import PlainController, first_wish, passing, scored, used_heads

STAYS = 2**40
"""Decision at which a seed is culled that is to be committed: none."""


class Column(IntEnum):
    """What the table of a plan says of each seed: choices of a germination, then decisions.

    A seed whose blueprint is NOOP does not exist.
    """

    SLOT = 0
    BLUEPRINT = 1
    STYLE = 2
    TEMPO = 3
    ALPHA_TARGET = 4
    BEGIN = 5
    CULL = 6


_HEAD_OF_COLUMN = {
    Column.BLUEPRINT: Head.BLUEPRINT,
    Column.STYLE: Head.STYLE,
    Column.TEMPO: Head.TEMPO,
    Column.ALPHA_TARGET: Head.ALPHA_TARGET,
}


class PlanController(PlainController):
    """Plays a plan of its own in each row; a plan never looks at what its seeds bring.

    A seed is germinated as soon as it is due and its slot is empty, and advanced as soon as the gates let it. One that
    is to be culled is culled from its decision on, and is never committed; each other is committed as soon as its gate
    lets it. One action a decision: commitments come first, then culls, germinations in the order in which they were
    due, and advances. What has to wait is done as soon as it can be; a seed that would begin only after it was to be
    culled is left out.

    Parameters
    ----------
    table_RKF
        Int64: each row's plan, columns as in `Column`, the seeds in the order in which they begin.
    slots
        Number of slots.
    """

    _memory = ("_sown_RK", "_cull_RS")

    _action_RH: Tensor

    def __init__(self, table_RKF: Tensor, slots: int) -> None:
        self._table_RKF = table_RKF
        self._used_OH = used_heads(table_RKF.device)
        self._every_R = torch.arange(len(table_RKF), device=table_RKF.device)
        self._sown_RK = table_RKF[:, :, Column.BLUEPRINT] == int(Blueprint.NOOP)
        """Seeds that were germinated, or do not exist."""
        self._cull_RS = torch.full_like(table_RKF[:, :1, 0], STAYS).repeat(1, slots)
        """When the seed that was last germinated in each slot is to be culled."""

    def observe(self, view: PopulationView) -> None:
        """Decide: commit, cull, germinate what is due, advance, or wait."""
        slots, decision = view.slots, view.decision
        legal_ROS = legal_ops(slots, view.fits_SB)
        advance_RS, fossilize_RS = passing(view)
        cull_RS = legal_ROS[:, int(Op.CULL)] & (self._cull_RS <= decision)
        slot_RK, begin_RK, cull_RK = (self._table_RKF[:, :, c] for c in (Column.SLOT, Column.BEGIN, Column.CULL))
        due_RK = ~self._sown_RK & (begin_RK <= decision) & (decision < cull_RK)
        due_RK = due_RK & legal_ROS[:, int(Op.GERMINATE)].gather(1, slot_RK)
        first_R = torch.where(due_RK, begin_RK, STAYS).argmin(1)
        seed_RF = self._table_RKF[self._every_R, first_R]
        slot_R1 = seed_RF[:, Column.SLOT, None]
        germinate_RS = torch.zeros_like(cull_RS).scatter(1, slot_R1, due_RK.any(1, keepdim=True))
        op_R, slot_R = first_wish(
            (
                (Op.FOSSILIZE, scored(fossilize_RS & (self._cull_RS == STAYS), slots.stage_age)),
                (Op.CULL, scored(cull_RS, slots.stage_age)),
                (Op.GERMINATE, scored(germinate_RS, slots.stage_age)),
                (Op.ADVANCE, scored(advance_RS, slots.stage)),
            )
        )
        action_RH = seed_RF.new_zeros(len(seed_RF), HEAD_COUNT)
        action_RH[:, Head.OP], action_RH[:, Head.SLOT] = op_R, slot_R
        for column, head in _HEAD_OF_COLUMN.items():
            action_RH[:, head] = seed_RF[:, column]
        self._action_RH = action_RH * self._used_OH[op_R]
        begun_R1 = (op_R == int(Op.GERMINATE))[:, None]
        self._sown_RK = self._sown_RK.scatter(1, first_R[:, None], self._sown_RK.gather(1, first_R[:, None]) | begun_R1)
        ends_R1 = torch.where(begun_R1, seed_RF[:, Column.CULL, None], self._cull_RS.gather(1, slot_R1))
        self._cull_RS = self._cull_RS.scatter(1, slot_R1, ends_R1)

    def act(self) -> Tensor:
        """What was decided."""
        return self._action_RH
