"""Classify, then hedge: incubate a few seeds, read the condition off the first losses, blend what is best for it.

A seed in the incubator costs its host nothing, so that growth loses hardly any time while the condition is found out.

Shape suffixes: R rows, S slots, M plans that can be made of a menu, C conditions, L losses that are looked at, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.actions import Blueprint, Head, Op
from esper.leyline.slots import legal_ops
from esper.leyline.stages import YOUNG_STAGES, Stage, stage_table
from esper.leyline.view import PopulationView
from esper.tamiyo.controllers.base import PlainController, first_wish, passing, scored, used_heads


@dataclass(frozen=True)
class Classifier:
    """Tells the condition by linear scores of losses.

    Attributes
    ----------
    weight_LC, bias_C
        The scores are log-probabilities but for a constant.
    """

    weight_LC: Tensor
    bias_C: Tensor

    @property
    def decisions(self) -> int:
        """Decisions after which it judges: it looks at the training and the validation loss of each."""
        return len(self.weight_LC) // 2

    def probability(self, loss_RL: Tensor) -> Tensor:
        """Probability of each condition [R, C]; losses that are not finite count as 0."""
        return (loss_RL.nan_to_num(0.0, 0.0, 0.0) @ self.weight_LC + self.bias_C).softmax(1)


@dataclass(frozen=True)
class Menu:
    """What each row may grow: at most one seed in each slot.

    Attributes
    ----------
    germination_RSH
        Int64: the action that germinates the seed of each slot; NOOP as blueprint where there is none.
    part_RMS
        Bool: slots that each plan blends, none for a plan that grows nothing.
    net_RMC
        What each plan is worth in each condition (nats).
    """

    germination_RSH: Tensor
    part_RMS: Tensor
    net_RMC: Tensor


class HedgeController(PlainController):
    """Incubates its menu, judges the condition once, blends the plan that is best by that, and culls the rest.

    Seeds that are best in most conditions begin first. One action a decision: commitments come first, then culls,
    advances and germinations.

    Parameters
    ----------
    menu
        What each row may grow.
    classifier
        Tells the condition.
    """

    _memory = ("_loss_RL", "_wanted_RS")

    _view: PopulationView

    def __init__(self, menu: Menu, classifier: Classifier) -> None:
        rows, _, slots = menu.part_RMS.shape
        device = menu.part_RMS.device
        self._menu, self._classifier = menu, classifier
        self._used_OH = used_heads(device)
        self._young = stage_table(YOUNG_STAGES).to(device)
        self._every_R = torch.arange(rows, device=device)
        self._real_RS = menu.germination_RSH[:, :, Head.BLUEPRINT] != int(Blueprint.NOOP)
        best_RC = menu.net_RMC.argmax(1)
        self._often_RS = menu.part_RMS[self._every_R[:, None], best_RC].float().mean(1)
        """Share of the conditions in which the seed of a slot is part of the best plan."""
        self._loss_RL = torch.zeros(rows, 2 * classifier.decisions, device=device)
        self._wanted_RS = torch.zeros(rows, slots, dtype=torch.bool, device=device)
        """Seeds that are to be blended; none before the condition was judged."""

    def observe(self, view: PopulationView) -> None:
        """Remember the losses; when there are enough, choose."""
        self._view = view
        looks = self._classifier.decisions
        if 1 <= view.decision <= looks:
            new_RL = torch.stack((view.train_loss_R, view.val_loss_R), 1).float()
            self._loss_RL = torch.cat((self._loss_RL[:, 2:], new_RL), 1)
        if view.decision == looks:
            probability_RC1 = self._classifier.probability(self._loss_RL)[:, :, None]
            chosen_R = (self._menu.net_RMC @ probability_RC1)[:, :, 0].argmax(1)
            self._wanted_RS = self._menu.part_RMS[self._every_R, chosen_R]

    def act(self) -> Tensor:
        """Commit, cull what is not wanted, advance, germinate what may be wanted, or wait."""
        view, slots = self._view, self._view.slots
        advance_RS, fossilize_RS = passing(view)
        # Until the condition is known any seed may be wanted, and none is blended.
        may_RS = self._wanted_RS if view.decision >= self._classifier.decisions else self._real_RS
        waits_RS = (slots.stage == int(Stage.TRAINING)) & ~self._wanted_RS
        due_RS = may_RS & legal_ops(slots, view.fits_SB)[:, int(Op.GERMINATE)]
        op_R, slot_R = first_wish(
            (
                (Op.FOSSILIZE, scored(fossilize_RS, slots.stage_age)),
                (Op.CULL, scored(self._young[slots.stage] & ~may_RS, slots.stage_age)),
                (Op.ADVANCE, scored(advance_RS & ~waits_RS, slots.stage)),
                (Op.GERMINATE, scored(due_RS, self._often_RS)),
            )
        )
        action_RH = self._menu.germination_RSH[self._every_R, slot_R]
        action_RH[:, Head.OP], action_RH[:, Head.SLOT] = op_R, slot_R
        return action_RH * self._used_OH[op_R]
