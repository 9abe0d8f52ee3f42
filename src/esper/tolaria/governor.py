"""The governor: looks at every row after each decision, and says which of them failed.

A row fails if something about its host is not finite, if its loss, in training too, is far above its own history, or
if it is back at chance after it had learned something. All limits are relative to the loss of guessing, so that no
number of classes hides a failure. Whole-tensor functions on the device: nothing is read back.

Shapes: R rows, W remembered losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.config import GovernorConfig
from esper.leyline.panics import Panic
from esper.leyline.state import Tensors, put_back, taken

_REMEMBERED = ("_loss_RW", "_learned_R", "_guesses_R", "failure_R")


@dataclass(frozen=True)
class Verdict:
    """What the governor thinks of each row after a decision.

    Attributes
    ----------
    panic_R
        Int64, values of `Panic`: why a row failed in this decision.
    good_R
        Bool: the row is well, and worth returning to. One that may be about to fail is neither.
    """

    panic_R: Tensor
    good_R: Tensor


class Governor:
    """Judges the rows of one population over one episode.

    Parameters
    ----------
    config
        Limits.
    classes
        Of the task: ln of it is the loss of guessing.
    rows, device
        Of the population.

    Attributes
    ----------
    failure_R
        Int64, values of `Panic`: why the row failed, now or earlier; nothing is judged of it any more.
    judged
        Decisions so far.
    """

    def __init__(self, config: GovernorConfig, classes: int, rows: int, device: torch.device | str) -> None:
        self._config = config
        self._guess = math.log(classes)
        self._guessing_accuracy = 1 / classes + config.collapsed_accuracy * (1 - 1 / classes)
        self._loss_RW = torch.full((rows, config.governor_window), self._guess, device=device)
        self.judged = 0
        self._learned_R = torch.zeros(rows, dtype=torch.bool, device=device)
        self._guesses_R = torch.zeros(rows, dtype=torch.int64, device=device)
        """Decisions in a row at chance."""
        self.failure_R = torch.full((rows,), int(Panic.NONE), device=device)

    @property
    def retired_R(self) -> Tensor:
        """Bool: the row failed, now or earlier."""
        return self.failure_R != int(Panic.NONE)

    def state(self) -> Tensors:
        """Give what is remembered of the rows, by name; beside it there is the number of decisions judged."""
        return taken(self, _REMEMBERED)

    def restore(self, saved: Mapping[str, Tensor], judged: int) -> None:
        """Remember what was saved after so many decisions.

        Raises
        ------
        ValueError
            It is of other rows.
        """
        put_back(self, _REMEMBERED, saved)
        self.judged = judged

    @torch.no_grad()
    def judge(self, train_loss_R: Tensor, val_loss_R: Tensor, val_accuracy_R: Tensor, norm_R: Tensor) -> Verdict:
        """Judge every row by one decision.

        Parameters
        ----------
        train_loss_R
            Mean over the updates of the decision (nats).
        val_loss_R, val_accuracy_R
            On reward-validation after them (nats, share).
        norm_R
            Sum of the norms of the host's gradients in these updates.
        """
        config, loss_RW, guess = self._config, self._loss_RW, self._guess
        val_loss_R = val_loss_R.float()
        finite_R = train_loss_R.isfinite() & val_loss_R.isfinite() & norm_R.isfinite()
        median_R = _median(loss_RW)
        deviation_R = _median((loss_RW - median_R[:, None]).abs())
        room_R = (config.diverged_deviations * deviation_R).clamp_min(config.diverged_guesses * guess)
        excess_R = val_loss_R - median_R
        # Running statistics that lag behind raise the loss of evaluation for a moment, and nothing else.
        both_R = torch.minimum(excess_R, train_loss_R.float() - median_R)
        diverged_R = (both_R > room_R) | (excess_R > config.diverged_at_once * room_R)
        self._learned_R |= median_R < config.learned_guesses * guess
        guessing_R = (val_loss_R > config.collapsed_guesses * guess) & (val_accuracy_R <= self._guessing_accuracy)
        fallen_R = self._learned_R & guessing_R
        self._guesses_R.add_(1).mul_(fallen_R)
        collapsed_R = self._guesses_R >= config.collapsed_decisions
        panic_R = torch.where(collapsed_R, int(Panic.COLLAPSED), int(Panic.NONE))
        panic_R.masked_fill_(diverged_R, int(Panic.DIVERGED))
        panic_R.masked_fill_(~finite_R, int(Panic.NOT_FINITE))
        panic_R.masked_fill_(self.retired_R, int(Panic.NONE))
        self.failure_R = torch.where(self.retired_R, self.failure_R, panic_R)
        # A median does not mind the order of its values.
        loss_RW[:, self.judged % config.governor_window] = val_loss_R.nan_to_num(guess, guess, guess)
        self.judged += 1
        return Verdict(panic_R, ~self.retired_R & ~fallen_R & (excess_R <= room_R / 2))


def _median(values_RW: Tensor) -> Tensor:
    """The middle one of an odd number of values, [R]; sorted, because `median` is not deterministic on every device."""
    return values_RW.sort(1).values[:, values_RW.shape[1] // 2]
