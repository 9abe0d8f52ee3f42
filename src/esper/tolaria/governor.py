"""The governor: looks at every row after each decision, and says which of them failed.

A row fails if its host is no longer finite, if its loss, in training too, is far above its own history, if it is back
at chance after it had learned something, or if it skipped many more updates than it made. A skipped update alone is no
failure. Limits of losses are relative to the loss of guessing, so that no number of classes hides a failure.
Whole-tensor functions on the device: nothing is read back.

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

_REMEMBERED = (
    *("_loss_RW", "_learned_R", "_guesses_R", "_excess_R", "_calm_R", "_lowered_R"),
    *("failure_R", "skipped_R", "restored_R"),
)


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
    recovers
        A row that fails goes on from its last good state, with a lower learning rate, until it has failed too often:
        for growing one network. Otherwise its episode is over: for training a policy, which must not learn from a host
        that was put back.

    Attributes
    ----------
    failure_R
        Int64, values of `Panic`: why the row is over, now or earlier; nothing is judged of it any more.
    skipped_R, restored_R
        Int64: updates that the host skipped, and how often the row went on after a failure.
    judged
        Decisions so far.
    recovers
        As given.
    """

    def __init__(
        self, config: GovernorConfig, classes: int, rows: int, device: torch.device | str, *, recovers: bool
    ) -> None:
        self._config, self.recovers = config, recovers
        self._guess = math.log(classes)
        self._guessing_accuracy = 1 / classes + config.collapsed_accuracy * (1 - 1 / classes)
        self._loss_RW = torch.full((rows, config.governor_window), self._guess, device=device)
        self.judged = 0
        self._learned_R = torch.zeros(rows, dtype=torch.bool, device=device)
        none_R = torch.zeros(rows, dtype=torch.int64, device=device)
        self._guesses_R = none_R.clone()
        """Decisions in a row at chance."""
        self._excess_R = none_R.clone()
        """Updates skipped less updates made, counted from where that was lowest (CUSUM: Page 1954)."""
        self._calm_R = torch.full_like(none_R, config.governor_window)
        """Decisions since the row was restored; those before the first count as enough."""
        self._lowered_R = none_R.clone()
        """Restorations from which the row has not recovered."""
        self.skipped_R, self.restored_R = none_R.clone(), none_R.clone()
        self.failure_R = torch.full((rows,), int(Panic.NONE), device=device)
        # A power rounds differently with the number of rows.
        shares = [config.recovery_rate**lowered for lowered in range(config.most_restorations + 1)]
        self._rate_shares = torch.tensor(shares, device=device)

    @property
    def retired_R(self) -> Tensor:
        """Bool: the row is over: it failed, now or earlier, and does not go on."""
        return self.failure_R != int(Panic.NONE)

    @property
    def rate_share_R(self) -> Tensor:
        """Share of its learning rate that each row trains with: below 1 while it recovers."""
        return self._rate_shares[self._lowered_R]

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
    def judge(
        self,
        train_loss_R: Tensor,
        val_loss_R: Tensor,
        val_accuracy_R: Tensor,
        *,
        finite_R: Tensor,
        skipped_R: Tensor,
        updates: int,
    ) -> Verdict:
        """Judge every row by one decision.

        Parameters
        ----------
        train_loss_R
            Mean over the updates of the decision (nats); NaN where none was finite.
        val_loss_R, val_accuracy_R
            On reward-validation after them (nats, share).
        finite_R
            Bool: all parameters and statistics of the network are finite.
        skipped_R
            Int64: updates of the decision that the host skipped.
        updates
            Updates of the decision.
        """
        config, loss_RW, guess = self._config, self._loss_RW, self._guess
        over_R = self.retired_R
        val_loss_R = val_loss_R.float()
        median_R = _median(loss_RW)
        deviation_R = _median((loss_RW - median_R[:, None]).abs())
        room_R = (config.diverged_deviations * deviation_R).clamp_min(config.diverged_guesses * guess)
        excess_R = val_loss_R - median_R
        # Running statistics that lag behind raise the loss of evaluation for a moment, and nothing else.
        in_training_R = train_loss_R.float().nan_to_num(torch.inf, torch.inf, torch.inf) - median_R
        both_R = torch.minimum(excess_R, in_training_R)
        diverged_R = (both_R > room_R) | (excess_R > config.diverged_at_once * room_R)
        self._learned_R |= median_R < config.learned_guesses * guess
        guessing_R = (val_loss_R > config.collapsed_guesses * guess) & (val_accuracy_R <= self._guessing_accuracy)
        fallen_R = self._learned_R & guessing_R
        self._guesses_R.add_(1).mul_(fallen_R)
        collapsed_R = self._guesses_R >= config.collapsed_decisions
        self.skipped_R += skipped_R.masked_fill(over_R, 0)
        self._excess_R.add_(2 * skipped_R - updates).clamp_(min=0)
        panic_R = torch.where(self._excess_R >= config.most_skipped_updates, int(Panic.SKIPPED), int(Panic.NONE))
        panic_R.masked_fill_(collapsed_R, int(Panic.COLLAPSED))
        panic_R.masked_fill_(diverged_R, int(Panic.DIVERGED))
        panic_R.masked_fill_(~(finite_R & val_loss_R.isfinite()), int(Panic.NOT_FINITE))
        panic_R.masked_fill_(over_R, int(Panic.NONE))
        failed_R = panic_R != int(Panic.NONE)
        # A median does not mind the order of its values.
        loss_RW[:, self.judged % config.governor_window] = val_loss_R.nan_to_num(guess, guess, guess)
        self.judged += 1
        self._calm_R += 1
        # After a restoration the older state stays until the history is the row's own again.
        own_R = (self._calm_R >= config.governor_window) & (self._excess_R == 0)
        good_R = own_R & ~over_R & ~failed_R & ~fallen_R & (excess_R <= room_R / 2)
        self._end_or_restore(panic_R, failed_R)
        return Verdict(panic_R, good_R)

    def _end_or_restore(self, panic_R: Tensor, failed_R: Tensor) -> None:
        """End the rows that failed, or begin their history anew; count how far the others have recovered."""
        config = self._config
        recovered_R = (self._calm_R % config.recovery_decisions == 0) & ~failed_R
        self._lowered_R.sub_(recovered_R.long()).clamp_(min=0)
        again_R = failed_R & (self._lowered_R < config.most_restorations) & self.recovers
        self.failure_R = torch.where(failed_R & ~again_R, panic_R, self.failure_R)
        self.restored_R += again_R
        self._lowered_R += again_R
        # Without its seeds the host may be much worse than it was: it is judged as one that has learned nothing yet.
        self._loss_RW.masked_fill_(again_R[:, None], self._guess)
        for counter_R in (self._learned_R, self._guesses_R, self._excess_R, self._calm_R):
            counter_R.masked_fill_(again_R, 0)


def _median(values_RW: Tensor) -> Tensor:
    """The middle one of an odd number of values, [R]; sorted, because `median` is not deterministic on every device."""
    return values_RW.sort(1).values[:, values_RW.shape[1] // 2]
