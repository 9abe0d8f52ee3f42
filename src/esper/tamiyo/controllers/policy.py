"""The learned policy as a controller.

Shape suffixes: R rows, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.streams import Stream
from esper.leyline.view import PopulationView, Scores
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.network import Decision, FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observation, Observer


class PolicyController:
    """Observes, masks and asks the network; one instance serves one episode.

    Parameters
    ----------
    policy
        On the device of the views.
    seed
        Seed of the run.
    row_ids_R
        Identity of each row: together with the decision it decides the row's numbers, and nothing else does.
    greedy
        Take the most likely choices instead of drawing.

    Attributes
    ----------
    observation, decision
        What was seen and done last, for learning.
    """

    observation: Observation
    decision: Decision
    _masks: ActionMasks
    _observer: Observer

    def __init__(
        self, policy: FactoredRecurrentActorCritic, seed: int, row_ids_R: Tensor, *, greedy: bool = False
    ) -> None:
        self._policy, self._row_ids_R, self._greedy = policy, row_ids_R, greedy
        self._stream = Stream(seed, "policy sampling")
        self._hidden = policy.initial_hidden(len(row_ids_R))

    @property
    def flag(self) -> Tensor | None:
        """What was wrong with the last decision's masks or logits: see `Controller`."""
        return self.decision.flag

    @property
    def scores(self) -> Scores:
        """Log-probabilities and value of the last decision."""
        return Scores(self.decision.log_prob_RH, self.decision.value_R)

    def observe(self, view: PopulationView) -> None:
        """Take in the state and decide."""
        rows = len(self._row_ids_R)
        if view.decision == 0:
            self._observer = Observer(rows, view.slot_config, view.slots.device)
            self._masks = ActionMasks.empty(rows, view.fits_SB)
        self.observation = self._observer.observe(view)
        masks = compute_batch_masks(view.slots, self._masks)
        decision_R = torch.full_like(self._row_ids_R, view.decision)
        uniform_RH = self._stream.uniform(self._row_ids_R, decision_R, HEAD_COUNT, torch.float32)
        self.decision = self._policy.get_action(self.observation, masks, self._hidden, uniform_RH, greedy=self._greedy)
        self._hidden = self.decision.hidden

    def act(self) -> Tensor:
        """What was decided."""
        return self.decision.action_RH
