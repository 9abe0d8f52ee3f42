"""What a controller sees and what it is: one interface for all of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from esper.leyline.actions import HEAD_COUNT
from esper.leyline.checks import GateReport, Outcome
from esper.leyline.sites import SlotConfig
from esper.leyline.slots import SlotTensors
from esper.leyline.state import Tensors


@dataclass(frozen=True)
class PopulationView:
    """A population between two decisions, valid until the next one: the slots change in place.

    Losses in nats, accuracies as fractions, NaN where not measured.

    Attributes
    ----------
    decision, horizon
        Decisions made so far, and of the whole episode.
    slots
        The slot tensors; a controller reads them and never writes.
    slot_config, fits_SB
        Names and kinds of the slots; which blueprints fit (bool).
    seed_parameters_SBO
        Int64: learned numbers that a seed of a blueprint and an operator would have in a slot, 0 where it fits none of
        the kind.
    gates
        What each gate would say now.
    train_loss_R, val_loss_R, val_accuracy_R
        Mean training loss of the last decision; loss and accuracy on reward-validation after it. For a row that was
        rolled back, those of the state that it returned to.
    host_parameters
        Learned numbers of one host without seeds.
    classes
        Number of classes of the task: ln of it is the loss of guessing.
    price_R
        What one unit of ln(1 + added / host parameters) costs in the objective (nats); see `RunConfig.price`.
    last, last_action_RH
        Outcome of the previous decision, and what was asked; None before the first.
    """

    decision: int
    horizon: int
    slots: SlotTensors
    slot_config: SlotConfig
    fits_SB: torch.Tensor
    seed_parameters_SBO: torch.Tensor
    gates: GateReport
    train_loss_R: torch.Tensor
    val_loss_R: torch.Tensor
    val_accuracy_R: torch.Tensor
    host_parameters: int
    classes: int
    price_R: torch.Tensor
    last: Outcome | None
    last_action_RH: torch.Tensor | None


@dataclass(frozen=True)
class Scores:
    """What a controller thought of its last action, for the record.

    Attributes
    ----------
    log_prob_RH
        Log-probability of each head's choice given those before it.
    value_R
        What it expected to be paid from there on.
    """

    log_prob_RH: torch.Tensor
    value_R: torch.Tensor


class Controller(Protocol):
    """Decides for a whole population at once.

    Attributes
    ----------
    flag
        Int64 scalar on the device: what was wrong with the last action, 0 if nothing was. It travels to the host with
        the decision's one transfer and is raised there. None for a controller that has nothing to check.
    scores
        What it thought of its last action; None for a controller without probabilities.
    """

    @property
    def flag(self) -> torch.Tensor | None:
        """See the class."""

    @property
    def scores(self) -> Scores | None:
        """See the class."""

    def observe(self, view: PopulationView) -> None:
        """Take in the state before a decision; called once for each decision, in order."""

    def state(self) -> Tensors:
        """Give what its decisions to come depend on, by name."""

    def restore(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` gave, instead of from the start.

        Raises
        ------
        ValueError
            It is of something else.
        """

    def act(self) -> torch.Tensor:
        """Int64 [R, HEAD_COUNT]: one action for each row of the view observed last."""


def check_actions(action_RH: torch.Tensor, rows: int) -> torch.Tensor:
    """Give the actions back if they are int64 [R, HEAD_COUNT]: one row of them would be spread over all.

    Raises
    ------
    ValueError
        They have another shape or dtype.
    """
    if action_RH.shape != (rows, HEAD_COUNT) or action_RH.dtype != torch.int64:
        shape = list(action_RH.shape)
        raise ValueError(f"actions must be int64 [{rows}, {HEAD_COUNT}], got {action_RH.dtype} {shape}")
    return action_RH
