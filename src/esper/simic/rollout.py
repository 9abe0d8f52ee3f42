"""Storage of one round: everything that learning needs of every decision, allocated once on the device.

Shapes: T decisions, R rows, S slots, F features, H heads, C choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT
from esper.tamiyo.policy.action_masks import choice_count
from esper.tamiyo.policy.features import RUN_FEATURES, SLOT_FEATURES
from esper.tamiyo.policy.network import Decision
from esper.tamiyo.policy.observation import Observation


class Rollout:
    """Decisions of a population from the first to the last of an episode.

    Parameters
    ----------
    decisions, rows, slots
        T, R, S.
    group_R, learners_N
        As below; by default one group, and everyone.
    device
        Of every tensor.

    Attributes
    ----------
    slot_TRSF, run_TRF
        Observations.
    action_TRH, mask_TRHC, log_prob_TRH, value_TR
        What was decided, and how.
    reward_TR
        Paid after the decision.
    made_TR
        Bool: the row was still running.
    group_R
        Int64: rows that share context, initialisation and data.
    learners_N
        Int64: rows that are learned from; a twin is not.
    learns_R
        The same as a mask.
    uniform_share
        Share of a uniform choice with which the actions were sampled, and are to be scored.
    """

    def __init__(
        self,
        decisions: int,
        rows: int,
        slots: int,
        *,
        group_R: Tensor | None = None,
        learners_N: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.decisions = decisions
        choices = choice_count(slots)

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(decisions, rows, *shape, dtype=dtype, device=device)

        self.slot_TRSF, self.run_TRF = zeros(slots, len(SLOT_FEATURES)), zeros(len(RUN_FEATURES))
        self.action_TRH = zeros(HEAD_COUNT, dtype=torch.int64)
        self.mask_TRHC = zeros(HEAD_COUNT, choices, dtype=torch.bool)
        self.log_prob_TRH, self.value_TR = zeros(HEAD_COUNT), zeros()
        self.reward_TR, self.made_TR = zeros(), zeros(dtype=torch.bool)
        every_R = torch.arange(rows, device=device)
        self.group_R = torch.zeros_like(every_R) if group_R is None else group_R.to(device)
        self.learners_N = every_R if learners_N is None else learners_N.to(device)
        self.learns_R = torch.isin(every_R, self.learners_N)
        self.uniform_share = 0.0

    def store(self, decision: int, observation: Observation, made: Decision, running_R: Tensor) -> None:
        """Copy one decision in, before its reward is known."""
        self.slot_TRSF[decision], self.run_TRF[decision] = observation.slot_RSF, observation.run_RF
        self.action_TRH[decision], self.mask_TRHC[decision] = made.action_RH, made.mask_RHC
        self.log_prob_TRH[decision], self.value_TR[decision] = made.log_prob_RH, made.value_R
        self.made_TR[decision] = running_R

    def pay(self, decision: int, reward_R: Tensor) -> None:
        """Copy the reward of a decision in."""
        self.reward_TR[decision] = reward_R

    @property
    def free_TR(self) -> Tensor:
        """Bool: a decision that was made, is learned from, and left a choice."""
        choice_TR = (self.mask_TRHC.sum(-1) > 1).any(-1)
        return self.made_TR & self.learns_R & choice_TR

    def observation(self, rows: Tensor) -> Observation:
        """All decisions of some rows."""
        return Observation(self.slot_TRSF[:, rows], self.run_TRF[:, rows])
