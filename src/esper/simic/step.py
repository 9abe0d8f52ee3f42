"""The record of one decision on the host.

Shapes: R rows, S slots, C gate checks, H heads, O operations.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from esper.leyline.slots import EMPTY_SLOT, Structure
from esper.leyline.transfer import Cargo


@dataclass(frozen=True)
class Step:
    """Host copy of one decision and of the state after its updates.

    Losses in nats, accuracies as fractions, NaN where not measured.

    Attributes
    ----------
    decision
        Number of the decision, from 0.
    action_RH, accepted_R, refused_by_R, before_R, after_R
        What was asked, and what came of it (values of `Check` and `Stage`).
    value_CRS, passed_CRS, limit_CRS
        The gates before the action.
    structure, acted
        Stages and seeds before the action, and after it and the clock.
    legal_RO
        Operations that some slot allowed.
    log_prob_RH, value_R
        The controller's scores (see `Scores`).
    slots
        The slot arrays after the updates, by name.
    reward
        Parts of each row's reward [R] by term; empty where nobody is paid.
    train_loss_R, val_loss_R, val_accuracy_R
        Mean training loss of the decision; loss and accuracy on reward-validation after it. For a row that failed in
        this decision what was measured before it was rolled back; for one that is over those of its last good state.
    panic_R, culled_RS
        Why the governor rolled a row back after the decision (values of `Panic`), and the seeds that this cost.
    over_R, rate_share_R
        Whether the row is over since then or earlier; the share of its learning rate that it goes on with.
    skipped_R
        Updates of the decision that the host skipped, because its gradient was not finite.
    harvested_RS
        The seeds that were culled after the last decision, because they were not committed.
    """

    decision: int
    action_RH: np.ndarray
    accepted_R: np.ndarray
    refused_by_R: np.ndarray
    before_R: np.ndarray
    after_R: np.ndarray
    value_CRS: np.ndarray
    passed_CRS: np.ndarray
    limit_CRS: np.ndarray
    structure: Structure
    acted: Structure
    legal_RO: np.ndarray
    log_prob_RH: np.ndarray
    value_R: np.ndarray
    slots: dict[str, np.ndarray]
    reward: dict[str, np.ndarray]
    train_loss_R: np.ndarray
    val_loss_R: np.ndarray
    val_accuracy_R: np.ndarray
    panic_R: np.ndarray
    culled_RS: np.ndarray
    over_R: np.ndarray
    rate_share_R: np.ndarray
    skipped_R: np.ndarray
    harvested_RS: np.ndarray


def step_of(cargo: Cargo, decision: int, structure: Structure, acted: Structure) -> Step:
    """Make the record out of what arrived with a transfer, and what the host knew before."""
    slots = {name: cargo.pop(f"slots.{name}") for name in EMPTY_SLOT}
    paid = [name for name in cargo if name.startswith("reward.")]
    reward = {name.removeprefix("reward."): cargo.pop(name) for name in paid}
    return Step(decision=decision, structure=structure, acted=acted, slots=slots, reward=reward, **cargo)
