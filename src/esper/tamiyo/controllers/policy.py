"""The learned policy as a controller.

Shape suffixes: R rows, H heads.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.state import Tensors, fitting
from esper.leyline.streams import Stream
from esper.leyline.view import PopulationView, Scores
from esper.tamiyo.policy.action_masks import ActionMasks, compute_batch_masks
from esper.tamiyo.policy.network import Decision, FactoredRecurrentActorCritic
from esper.tamiyo.policy.observation import Observation, Observer, unmeasured_history


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

    def __init__(
        self, policy: FactoredRecurrentActorCritic, seed: int, row_ids_R: Tensor, *, greedy: bool = False
    ) -> None:
        self._policy, self._row_ids_R, self._greedy = policy, row_ids_R, greedy
        self._stream = Stream(seed, "policy sampling")
        self._hidden = policy.initial_hidden(len(row_ids_R))
        self._observer: Observer | None = None
        self._history_RW = unmeasured_history(len(row_ids_R), row_ids_R.device)
        """What the observer remembers from the start."""

    @property
    def flag(self) -> Tensor | None:
        """What was wrong with the last decision's masks or logits: see `Controller`."""
        return self.decision.flag

    @property
    def scores(self) -> Scores:
        """Log-probabilities and value of the last decision."""
        return Scores(self.decision.log_prob_RH, self.decision.value_R)

    def state(self) -> Tensors:
        """See `Controller`."""
        hidden, cell = self._hidden
        history_RW = self._history_RW if self._observer is None else self._observer.history_RW
        return {"hidden": hidden, "cell": cell, "history_RW": history_RW, "fingerprint": self._fingerprint()}

    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """See `Controller`."""
        own = self._fingerprint()
        if not torch.equal(fitting("fingerprint", own, saved), own):
            raise ValueError("the policy in its folder is no longer the one that it began with")
        hidden, cell = self._hidden
        self._hidden = fitting("hidden", hidden, saved), fitting("cell", cell, saved)
        self._history_RW = fitting("history_RW", self._history_RW, saved)

    def _fingerprint(self) -> Tensor:
        """Checksum of the policy, uint8 [16]."""
        digest = hashlib.blake2b(digest_size=16)
        for name, tensor in self._policy.state_dict().items():
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        return torch.tensor(list(digest.digest()), dtype=torch.uint8)

    def observe(self, view: PopulationView) -> None:
        """Take in the state and decide."""
        rows = len(self._row_ids_R)
        if self._observer is None:
            self._observer = Observer(rows, view.slot_config, view.slots.device, self._history_RW)
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
